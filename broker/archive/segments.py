"""An archive: trained batches in segment files, in a folder or under any URL that fsspec knows.

A segment is `<first step>-<last step>.lachesis`: the line MAGIC, then frames, each a length (8 bytes, little-endian), a
BLAKE2b digest (16 bytes) and that many bytes: a header, then for every batch its description followed by its groups,
one frame each, as they are stored in Redis; then the end. All but the groups are msgpack (docs/retention.md).

A segment is written at once. Locally it gets its name when it is on disk; elsewhere the store decides, so a reader takes
one without an end as cut off by a crash. Its writer did not go on before it was whole, so the next one wrote the same
steps again; a step that stands twice is read once.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem
from msgspec import Struct

from lachesis.broker.errors import ArchiveUnreadable, ConfigurationError
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.steps import BatchEntry, LedgerEntry

MAGIC = b"lachesis archive 1\n"
_NAME = re.compile(r"(\d{10})-(\d{10})\.lachesis")
_FRAME = struct.Struct("<Q16s")
_LONGEST = 1 << 29  # Redis keeps no longer strings
_LONGEST_RECORD = 128 << 20  # a description: of 2^20 groups, twice, with ids of 60 letters


class Header(Struct, tag="segment", frozen=True):
    run: str
    codec: str  # of the groups
    written_at: float


class Description(Struct, tag="batch", frozen=True):
    batch: BatchEntry
    ledger: LedgerEntry


class End(Struct, tag="end", frozen=True):
    batches: int


class Archived(NamedTuple):
    """One trained batch with its groups as stored, in its order."""

    batch: BatchEntry
    ledger: LedgerEntry  # what training it gave
    blobs: list[bytes]
    codec: str
    segment: str = ""  # the path of the segment that it was read from

    @property
    def size(self) -> int:
        return sum(map(len, self.blobs))


class Segment(NamedTuple):
    first: int
    last: int
    path: str


class _CutOff(Exception):
    pass


_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Header | Description | End] = msgspec.msgpack.Decoder(Header | Description | End)


class Archive:
    """The archive in one folder. Raises ConfigurationError for a URL that nothing here can open."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, self._folder = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(f"archive = {url!r}: {error}") from None
        self._local = isinstance(self._fs, LocalFileSystem)

    # -- writing --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder, and clear it of what a killed writer left. For the one writer; raises ConfigurationError."""
        try:
            self._fs.makedirs(self._folder, exist_ok=True)
            if self._local:
                for part in Path(self._folder).glob("*.part"):
                    part.unlink()
        except OSError as error:
            raise ConfigurationError(f"archive = {self.url!r}: can't write there ({error})") from None

    def write(self, header: Header, batches: Sequence[Archived]) -> Segment:
        """Store batches of ascending steps as one segment; when this returns it is durable. Raises OSError."""
        first, last = batches[0].batch.step, batches[-1].batch.step
        segment = Segment(first, last, f"{self._folder}/{first:010}-{last:010}.lachesis")
        failpoint("segment", first)
        if self._local:
            part = Path(f"{segment.path}.part")
            with open(part, "wb") as file:
                _write(file, header, batches)
                file.flush()
                os.fsync(file.fileno())
            failpoint("segment-written", first)
            part.rename(segment.path)
            _sync_folder(self._folder)
        else:
            with self._fs.open(segment.path, "wb") as file:
                _write(file, header, batches)
        failpoint("segment-named", first)
        return segment

    # -- reading --------------------------------------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        """All segments, by their steps."""
        self._fs.invalidate_cache()
        try:
            paths = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        names = [(path, _NAME.fullmatch(path.rsplit("/", 1)[-1])) for path in paths]
        return sorted(Segment(int(name[1]), int(name[2]), path) for path, name in names if name)

    def newest(self) -> tuple[Header, BatchEntry] | None:
        """The newest batch that is durably archived: the last one of the last whole segment."""
        for segment in reversed(self.segments()):
            try:
                with self._fs.open(segment.path, "rb") as file:
                    header, last = _header(file, segment), None
                    for archived in _batches(file, segment, header):
                        last = archived.batch
            except _CutOff:
                continue
            if last is not None:
                return header, last
        return None

    def read(
        self,
        first: int = 1,
        last: int | None = None,
        *,
        note: Callable[[str], None],
        refuse: Callable[[str], None] | None = None,
    ) -> Iterator[Archived]:
        """Batches of steps `first` to `last`, each once, in order.

        `note` is told of segments that were cut off, and of steps in between that are missing; `refuse` of those that are
        damaged or no segments, whose sound beginning is read. Without it they raise ArchiveUnreadable.
        """
        newest = 0
        for segment in self.segments():
            if segment.last < first or (last is not None and segment.first > last):
                continue
            try:
                with self._fs.open(segment.path, "rb") as file:
                    for archived in _batches(file, segment, _header(file, segment)):
                        step = archived.batch.step
                        if step <= newest or step < first or (last is not None and step > last):
                            continue
                        if newest and step > newest + 1:
                            note(f"the archive does not hold steps {newest + 1} to {step - 1}")
                        newest = step
                        yield archived
            except _CutOff:
                note(f"{segment.path} is cut off: its writer was killed")
            except ArchiveUnreadable as error:
                if refuse is None:
                    raise
                refuse(str(error))


def _write(file: BinaryIO, header: Header, batches: Sequence[Archived]) -> None:
    file.write(MAGIC)
    _frame(file, _encode(header))
    for archived in batches:
        _frame(file, _encode(Description(archived.batch, archived.ledger)))
        for blob in archived.blobs:
            _frame(file, blob)
    _frame(file, _encode(End(len(batches))))


def _frame(file: BinaryIO, data: bytes) -> None:
    file.write(_FRAME.pack(len(data), _digest(data)))
    file.write(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(file: BinaryIO, segment: Segment) -> Header:
    magic = file.read(len(MAGIC))
    if MAGIC.startswith(magic) and magic != MAGIC:
        raise _CutOff
    if magic != MAGIC:
        raise ArchiveUnreadable(
            f"{segment.path} is no segment of format 1 (it begins with {magic!r}): another version of Lachesis wrote it, or something else"
        )
    header = _read_record(file, segment)
    if not isinstance(header, Header):
        raise _damaged(file, segment)
    return header


def _batches(file: BinaryIO, segment: Segment, header: Header) -> Iterator[Archived]:
    count = 0
    while not isinstance(found := _read_record(file, segment), End):
        if not isinstance(found, Description):
            raise _damaged(file, segment)
        blobs = [_read_frame(file, segment) for _ in found.batch.gids]
        count += 1
        yield Archived(found.batch, found.ledger, blobs, header.codec, segment.path)
    if found.batches != count or file.read(1):
        raise _damaged(file, segment)


def _read_record(file: BinaryIO, segment: Segment) -> Header | Description | End:
    data = _read_frame(file, segment, _LONGEST_RECORD)
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        raise _damaged(file, segment) from None


def _read_frame(file: BinaryIO, segment: Segment, longest: int = _LONGEST) -> bytes:
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        raise _CutOff
    length, digest = _FRAME.unpack(head)
    if length > longest:
        raise _damaged(file, segment)
    data = file.read(length)
    if len(data) < length:
        raise _CutOff
    if _digest(data) != digest:
        raise _damaged(file, segment)
    return data


def _damaged(file: BinaryIO, segment: Segment) -> ArchiveUnreadable:
    return ArchiveUnreadable(
        f"{segment.path} is damaged before byte {file.tell()}: put a copy back, or remove it to go on without its steps"
    )

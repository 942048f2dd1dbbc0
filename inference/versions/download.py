"""One version, copied from its URL into a folder of this machine: file by file, whole or rebuilt from differences."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lachesis.broker.errors import WeightsRefused
from lachesis.broker.records.versions import Base, FileInfo, Manifest, WeightsEntry
from lachesis.broker.weights.delta import apply_delta
from lachesis.broker.weights.manifest import MANIFEST, MAX_MANIFEST, read_manifest
from lachesis.inference.versions.verify import VersionGone

PIECE = 8 << 20  # bytes read at a time
PART = ".part-"

T = TypeVar("T")


class Abandoned(Exception):
    """The caller has set its `stop`."""


class Download:
    """Fills `folder`, which nobody else writes to meanwhile; what an earlier try left there is used.

    Args:
        complete: makes the copy of another version complete; the descriptor it returns keeps it until closed.
    """

    def __init__(
        self, entry: WeightsEntry, folder: Path, stop: threading.Event, complete: Callable[[WeightsEntry], int]
    ) -> None:
        self._entry, self._folder, self._stop, self._complete = entry, folder, stop, complete
        self._fs, self._root = self._remote()

    def run(self) -> None:
        """Raises VersionGone, WeightsRefused or Abandoned, as Staging.fetch does."""
        raw = self._read_manifest()
        if hashlib.sha256(raw).hexdigest() != self._entry.manifest_sha256:
            raise self._refused(f"{MANIFEST} is not the one that was published: its SHA-256 differs from the event's")
        try:
            manifest = read_manifest(raw)
        except WeightsRefused as error:
            raise self._refused(str(error)) from None
        self._check_room(manifest)
        for name, info in manifest.files.items():
            done = self._folder / name
            if done.exists() and done.stat().st_size == info.bytes:
                continue
            if manifest.base is not None and name in manifest.base.deltas:
                self._rebuild(manifest.base, done, info)
            else:
                self._fetch(done, info)
        for left in {path.name for path in self._folder.iterdir()} - manifest.files.keys() - {MANIFEST}:
            (self._folder / left).unlink()  # of a try that was killed
        _place(self._folder / f"{PART}{MANIFEST}", self._folder / MANIFEST, raw)

    def _read_manifest(self) -> bytes:
        """No more of it than a manifest may have, and a byte."""
        remote = self._read(lambda: self._fs.open(f"{self._root}/{MANIFEST}", "rb", cache_type="none"))
        if remote is None:
            raise VersionGone(f"version {self._entry.version}: {self._entry.uri} does not exist")
        raw = bytearray()
        with remote:
            while piece := self._read(partial(remote.read, MAX_MANIFEST + 1 - len(raw))):
                raw += piece
        return bytes(raw)

    def _check_room(self, manifest: Manifest) -> None:
        """Raise VersionGone, to be tried again, where the disk has no room for what is missing."""
        have = sum(path.stat().st_size for path in self._folder.iterdir())
        missing = sum(info.bytes for info in manifest.files.values()) - have
        if missing > (free := shutil.disk_usage(self._folder).free):
            raise VersionGone(
                f"version {self._entry.version}: {missing} bytes are missing, {self._folder} has room for {free}"
            )

    def _rebuild(self, base: Base, done: Path, info: FileInfo) -> None:
        """A whole file from its delta and the copy of its base."""
        told, entry = base.deltas[done.name], self._entry
        if base.version >= entry.version or told.whole != info:
            raise self._refused(f"{MANIFEST} contradicts itself about {done.name} and its base, version {base.version}")
        packed, part = done.with_name(f"{done.name}.delta"), done.with_name(PART + done.name)
        if not packed.exists():
            self._fetch(packed, told.file)
        lock = self._complete(
            msgspec.structs.replace(entry, version=base.version, uri=base.uri, manifest_sha256=base.manifest_sha256)
        )
        try:
            apply_delta(self._folder.parent / f"v{base.version:06d}" / done.name, packed, part, told)
        except WeightsRefused as error:
            packed.unlink()
            raise self._refused(str(error)) from None
        finally:
            os.close(lock)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(done)
        packed.unlink()

    def _fetch(self, to: Path, info: FileInfo) -> None:
        """What is missing of a file. A beginning that turns out to be of another file is fetched anew, once."""
        source = f"{self._root}/{to.name}"
        part = to.with_name(PART + to.name)
        resumed = part.exists() and part.stat().st_size <= info.bytes
        goes_on = False
        with part.open("r+b" if resumed else "wb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256") if resumed else hashlib.sha256()
            file.seek(0, os.SEEK_END)
            remote = self._read(lambda: self._fs.open(source, "rb", cache_type="none"))
            if remote is None:
                raise self._refused(f"{to.name} is missing")
            with remote:
                if file.tell():
                    try:
                        remote.seek(file.tell())
                    except (ValueError, OSError):  # a store that only reads from the beginning
                        file.truncate(0)
                        file.seek(0)
                        digest = hashlib.sha256()
                # a byte more is asked for than there should be, and never written
                while piece := self._read(lambda: remote.read(min(PIECE, info.bytes - file.tell() + 1))):
                    if goes_on := len(piece) > info.bytes - file.tell():
                        break
                    file.write(piece)
                    digest.update(piece)
                    if self._stop.is_set():
                        raise Abandoned
            os.fsync(file.fileno())
            size = file.tell()
            if size < info.bytes == remote.size:
                raise VersionGone(f"version {self._entry.version}: {source} ended early")
        if size == info.bytes and not goes_on and digest.hexdigest() == info.sha256:
            part.rename(to)
            return
        part.unlink()
        if resumed:
            self._fetch(to, info)
        elif goes_on or size != info.bytes:
            has = f"more than {size}" if goes_on else size
            raise self._refused(f"{to.name} has {has} bytes, the manifest says {info.bytes}")
        else:
            raise self._refused(f"the SHA-256 of {to.name} differs from the manifest's")

    def _remote(self) -> tuple[Any, str]:
        """(file system, path there). Raises WeightsRefused for a kind of URL that nothing here can read."""
        import fsspec  # not needed where versions lie in folders

        uri = self._entry.uri
        try:
            # not fsspec's cached one, whose connection may be broken for good
            fs, root = fsspec.core.url_to_fs(uri, skip_instance_cache=True)
        except (ValueError, ImportError) as error:
            raise self._refused(f"{uri!r} can't be read here: {error}") from None
        except Exception as error:  # one that connects at once
            raise self._unreadable(error) from error
        return fs, str(root).rstrip("/")

    def _read(self, read: Callable[[], T]) -> T | None:
        """What `read` returns, None where there is no such file; VersionGone, to be tried again, where it fails otherwise."""
        try:
            return read()
        except FileNotFoundError as error:
            if not _is_missing(error):
                raise self._unreadable(error) from error
            return None
        except Exception as error:  # every backend of fsspec has kinds of its own for a store that does not answer
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> VersionGone:
        what = f"version {self._entry.version}: {self._entry.uri} can't be read now"
        told = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        return VersionGone(f"{what}: {type(told).__name__}: {told}")

    def _refused(self, reason: str) -> WeightsRefused:
        return WeightsRefused(f"version {self._entry.version} refused: {reason}")


def _is_missing(error: FileNotFoundError) -> bool:
    """Whether the store said that there is no such file; fsspec says so of one that can't be reached, too."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return True
    return getattr(cause, "status", None) in (404, 410) or hasattr(cause, "response")  # aiohttp's error; boto's


def _place(part: Path, to: Path, content: bytes) -> None:
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(to)

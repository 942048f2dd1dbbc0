"""One version, copied from its URL into a folder of this machine: file by file, whole or rebuilt from differences."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lachesis.broker.delta import apply_delta
from lachesis.broker.errors import WeightsRefused
from lachesis.broker.records import Base, FileInfo, Manifest, WeightsEntry
from lachesis.inference.verification import MANIFEST, VersionGone

PIECE = 8 << 20  # bytes read at a time
PART = ".part-"

T = TypeVar("T")


class Abandoned(Exception):
    """The caller has set its `stop`."""


class Copying:
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
        raw = self._read(lambda: self._fs.cat_file(f"{self._root}/{MANIFEST}"))
        if raw is None:
            raise VersionGone(f"version {self._entry.version}: {self._entry.uri} does not exist")
        if hashlib.sha256(raw).hexdigest() != self._entry.manifest_sha256:
            raise self._refused(f"{MANIFEST} is not the one that was published: its SHA-256 differs from the event's")
        try:
            manifest = msgspec.json.decode(raw, type=Manifest)
        except msgspec.DecodeError as error:
            raise self._refused(f"{MANIFEST} can't be read: {error}") from None
        for name, info in manifest.files.items():
            if Path(name).name != name or name.startswith(PART):
                raise self._refused(f"{MANIFEST} names {name!r}, which is not a file's plain name")
            done = self._folder / name
            if done.exists() and done.stat().st_size == info.bytes:
                continue
            if manifest.base is not None and name in manifest.base.deltas:
                self._rebuild(manifest.base, done, info)
            else:
                self._fetch(done, info)
        _place(self._folder / f"{PART}{MANIFEST}", self._folder / MANIFEST, raw)

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
                while piece := self._read(lambda: remote.read(PIECE)):
                    file.write(piece)
                    digest.update(piece)
                    if self._stop.is_set():
                        raise Abandoned
            os.fsync(file.fileno())
            if file.tell() < info.bytes == remote.size:
                raise VersionGone(f"version {self._entry.version}: {source} ended early")
        if part.stat().st_size == info.bytes and digest.hexdigest() == info.sha256:
            part.rename(to)
            return
        size = part.stat().st_size
        part.unlink()
        if resumed:
            self._fetch(to, info)
        elif size != info.bytes:
            raise self._refused(f"{to.name} has {size} bytes, the manifest says {info.bytes}")
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
        except FileNotFoundError:
            return None
        except Exception as error:  # every backend of fsspec has kinds of its own for a store that does not answer
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> VersionGone:
        what = f"version {self._entry.version}: {self._entry.uri} can't be read now"
        return VersionGone(f"{what}: {type(error).__name__}: {error}")

    def _refused(self, reason: str) -> WeightsRefused:
        return WeightsRefused(f"version {self._entry.version} refused: {reason}")


def _place(part: Path, to: Path, content: bytes) -> None:
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(to)

"""Versions that lie elsewhere, copied to this machine: any URL that fsspec can read.

`v<version>/` under the staging folder is complete once it has its manifest, which is written last; every file is
checked against the manifest's hash before it gets its name. What was fetched before a kill is not fetched again. The
agents of one machine share the folder: one fetches a version, the others wait for it, and nobody deletes what another
uses. For that they hold `flock`s on the version's folder, which end with the process that has them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from lachesis.broker.delta import apply_delta
from lachesis.broker.errors import WeightsRefused
from lachesis.broker.records import Base, FileInfo, Manifest, WeightsEntry
from lachesis.inference.verification import MANIFEST, VersionGone

PIECE = 8 << 20  # bytes read at a time
LOCK_POLL_S = 0.1
PART = ".part-"

T = TypeVar("T")


class Abandoned(Exception):
    """The caller has set its `stop`."""


def is_remote(entry: WeightsEntry) -> bool:
    """Whether the version has to be staged: its URI is a URL of another kind than file://."""
    return urlsplit(entry.uri).scheme not in ("", "file")


class Staging:
    """Copies of one policy's versions; the newest `keep` of them, and those in use, stay."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._held: tuple[Path, int] | None = None  # the copy that this process uses, and its locked descriptor

    def fetch(self, entry: WeightsEntry, stop: threading.Event) -> Path:
        """The folder of a complete copy, which stays until the next one is fetched. Blocks.

        Raises VersionGone where the version is not there or can't be read now, WeightsRefused where it is not what its
        manifest says, Abandoned soon after `stop` was set.
        """
        folder = self._folder / f"v{entry.version:06d}"
        if self._held is not None and self._held[0] == folder:
            self._let_go()
        lock = self._complete(entry, folder, stop)
        self._let_go()
        self._held = folder, lock
        os.utime(folder)
        self._collect()
        return folder

    def _complete(self, entry: WeightsEntry, folder: Path, stop: threading.Event) -> int:
        """The locked descriptor of the folder, once it is a complete copy; first its base is, if the version is a delta."""
        lock = _lock(folder, stop, complete=lambda: self._is_complete(folder, entry))
        try:
            if not self._is_complete(folder, entry):
                _copy(entry, folder, stop, self._complete)
            fcntl.flock(lock, fcntl.LOCK_SH)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held[1])
            self._held = None

    def _is_complete(self, folder: Path, entry: WeightsEntry) -> bool:
        try:
            return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == entry.manifest_sha256
        except FileNotFoundError:
            return False

    def _collect(self) -> None:
        """Delete the copies used longest ago, but for those in use here or by another agent."""
        for folder in sorted(self._folder.glob("v*"), key=_used_at, reverse=True)[self._keep :]:
            with contextlib.suppress(FileNotFoundError):  # another agent was faster
                _delete_unused(folder)


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another agent deleted it
        return 0.0


def _delete_unused(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that no half of it ever counts as complete
        shutil.rmtree(folder)
    except BlockingIOError:
        pass  # in use
    finally:
        os.close(lock)


def _lock(folder: Path, stop: threading.Event, complete: Callable[[], bool]) -> int:
    """A locked descriptor of the folder: exclusively, to fill it, or shared with others once it is complete."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for mode in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            try:
                fcntl.flock(lock, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            same = folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())  # not deleted meanwhile
            if same and (mode == fcntl.LOCK_EX or complete()):
                return lock
        os.close(lock)
        _pause(stop)


def _pause(stop: threading.Event) -> None:
    if stop.wait(LOCK_POLL_S):
        raise Abandoned


def _copy(
    entry: WeightsEntry,
    folder: Path,
    stop: threading.Event,
    complete: Callable[[WeightsEntry, Path, threading.Event], int],
) -> None:
    fs, root = _remote(entry)
    raw = _read(entry, lambda: fs.cat_file(f"{root}/{MANIFEST}"))
    if raw is None:
        raise VersionGone(f"version {entry.version}: {entry.uri} does not exist")
    if hashlib.sha256(raw).hexdigest() != entry.manifest_sha256:
        raise _refused(entry, f"{MANIFEST} is not the one that was published: its SHA-256 differs from the event's")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise _refused(entry, f"{MANIFEST} can't be read: {error}") from None
    deltas = manifest.base.deltas if manifest.base is not None else {}
    for name, info in manifest.files.items():
        if Path(name).name != name or name.startswith(PART):
            raise _refused(entry, f"{MANIFEST} names {name!r}, which is not a file's plain name")
        done = folder / name
        if done.exists() and done.stat().st_size == info.bytes:
            continue
        if manifest.base is not None and name in deltas:
            packed = folder / f"{name}.delta"
            if not packed.exists():
                _copy_file(entry, fs, f"{root}/{packed.name}", packed, deltas[name].file, stop)
            _rebuild(entry, manifest.base, packed, done, info, stop, complete)
            packed.unlink()
        else:
            _copy_file(entry, fs, f"{root}/{name}", done, info, stop)
    _place(folder / f"{PART}{MANIFEST}", folder / MANIFEST, raw)


def _rebuild(
    entry: WeightsEntry,
    base: Base,
    packed: Path,
    done: Path,
    info: FileInfo,
    stop: threading.Event,
    complete: Callable[[WeightsEntry, Path, threading.Event], int],
) -> None:
    """A whole file from its delta and the copy of its base."""
    told = base.deltas[done.name]
    if base.version >= entry.version or told.whole != info:
        raise _refused(entry, f"{MANIFEST} contradicts itself about {done.name} and its base, version {base.version}")
    beneath = done.parent.parent / f"v{base.version:06d}"
    of_base = msgspec.structs.replace(entry, version=base.version, uri=base.uri, manifest_sha256=base.manifest_sha256)
    lock = complete(of_base, beneath, stop)
    part = done.with_name(PART + done.name)
    try:
        apply_delta(beneath / done.name, packed, part, told)
    except WeightsRefused as error:
        packed.unlink()
        raise _refused(entry, str(error)) from None
    finally:
        os.close(lock)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(done)


def _copy_file(entry: WeightsEntry, fs: Any, source: str, to: Path, info: FileInfo, stop: threading.Event) -> None:
    """Fetch what is missing of a file. A beginning that turns out to be of another file is fetched anew, once."""
    part = to.with_name(PART + to.name)
    resumed = part.exists() and part.stat().st_size <= info.bytes
    with part.open("r+b" if resumed else "wb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256") if resumed else hashlib.sha256()
        file.seek(0, os.SEEK_END)
        remote = _read(entry, lambda: fs.open(source, "rb", cache_type="none"))
        if remote is None:
            raise _refused(entry, f"{to.name} is missing")
        with remote:
            if file.tell():
                try:
                    remote.seek(file.tell())
                except (ValueError, OSError):  # a store that only reads from the beginning
                    file.truncate(0)
                    file.seek(0)
                    digest = hashlib.sha256()
            while piece := _read(entry, lambda: remote.read(PIECE)):
                file.write(piece)
                digest.update(piece)
                if stop.is_set():
                    raise Abandoned
        os.fsync(file.fileno())
        if file.tell() < info.bytes == remote.size:
            raise VersionGone(f"version {entry.version}: {source} ended early")
    if part.stat().st_size == info.bytes and digest.hexdigest() == info.sha256:
        part.rename(to)
        return
    size = part.stat().st_size
    part.unlink()
    if resumed:
        _copy_file(entry, fs, source, to, info, stop)
    elif size != info.bytes:
        raise _refused(entry, f"{to.name} has {size} bytes, the manifest says {info.bytes}")
    else:
        raise _refused(entry, f"the SHA-256 of {to.name} differs from the manifest's")


def _place(part: Path, to: Path, content: bytes) -> None:
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(to)


def _remote(entry: WeightsEntry) -> tuple[Any, str]:
    """(file system, path there). Raises WeightsRefused for a kind of URL that nothing here can read."""
    import fsspec  # not needed where versions lie in folders

    try:
        fs, root = fsspec.core.url_to_fs(entry.uri, skip_instance_cache=True)
    except (ValueError, ImportError) as error:
        raise _refused(entry, f"{entry.uri!r} can't be read here: {error}") from None
    return fs, str(root).rstrip("/")


def _read(entry: WeightsEntry, read: Callable[[], T]) -> T | None:
    """What `read` returns, None where there is no such file; VersionGone, to be tried again, where it fails otherwise."""
    try:
        return read()
    except FileNotFoundError:
        return None
    except Exception as error:  # every backend of fsspec has kinds of its own for a store that does not answer
        raise VersionGone(f"version {entry.version}: {entry.uri} can't be read now: {type(error).__name__}: {error}") from error  # fmt: skip


def _refused(entry: WeightsEntry, reason: str) -> WeightsRefused:
    return WeightsRefused(f"version {entry.version} refused: {reason}")

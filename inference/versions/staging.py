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
from urllib.parse import urlsplit

from lachesis.broker.records.versions import WeightsEntry
from lachesis.broker.weights.manifest import MANIFEST
from lachesis.inference.versions.download import Abandoned, Download

STAGING_POLL_S = 0.1


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
        folder = self._place(entry)
        if self._held is not None and self._held[0] == folder:
            self._let_go()
        lock = self._complete(entry, stop)
        self._let_go()
        self._held = folder, lock
        os.utime(folder)
        self._collect()
        return folder

    def _complete(self, entry: WeightsEntry, stop: threading.Event) -> int:
        """The locked descriptor of the folder, once it is a complete copy; first its base is, if the version is a delta."""
        folder = self._place(entry)
        lock = _lock(folder, stop, complete=lambda: self._is_complete(folder, entry))
        try:
            if not self._is_complete(folder, entry):
                Download(entry, folder, stop, lambda other: self._complete(other, stop)).run()
            fcntl.flock(lock, fcntl.LOCK_SH)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _place(self, entry: WeightsEntry) -> Path:
        return self._folder / f"v{entry.version:06d}"

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
    if stop.wait(STAGING_POLL_S):
        raise Abandoned

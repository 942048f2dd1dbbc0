"""What the contents of a version's files were found to be, once for all agents of a machine.

Two agents that hash the same gigabytes at the same moment take the processor from each other, and from SGLang. A record
`<manifest's SHA-256>` holds the identity of each file when they were found in order: device, inode, size, and the times
of the last change of content and of inode, of which the kernel lets nobody set the last. Another file in its place, or a
byte written since, and they are read again. (The times are as coarse as the kernel's clock tick: what changed within the
last TICK_S is not recorded.) `flock` on the record makes others wait for who reads; it ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

KEEP_RECORDS = 8  # records
READER_PATIENCE_S = 60.0  # for who reads the files; one that is stopped holds nobody up for longer
READER_POLL_S = 0.01
TICK_S = 0.05


class VerificationCache:
    """Records in a folder that only the agents of this machine can write."""

    def __init__(self, folder: Path, patience_s: float = READER_PATIENCE_S) -> None:
        self._folder, self._patience_s = folder, patience_s

    def check_once(self, manifest_sha256: str, files: Sequence[Path], check: Callable[[], None]) -> None:
        """Call `check` unless these very files passed it before. What it raises is raised, and nothing recorded."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / manifest_sha256).open("a+b") as record:
            alone = self._lock(record)
            before, _ = _identities(files)
            record.seek(0)
            if record.read() == before:
                return
            check()
            after, changed_at = _identities(files)
            if (
                alone and after == before and time.time() - changed_at > TICK_S
            ):  # a record cut short by a kill equals no identity
                record.truncate(0)
                record.write(before)
        self._collect()

    def _lock(self, record: BinaryIO) -> bool:
        """False where who has it keeps it for too long."""
        until = time.monotonic() + self._patience_s
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            if time.monotonic() > until:
                return False
            time.sleep(READER_POLL_S)

    def _collect(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # another agent was faster
            for old in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEEP_RECORDS]:
                old.unlink()


def _identities(files: Sequence[Path]) -> tuple[bytes, float]:
    """Of all files, and when one was last changed."""
    found = {str(path.absolute()): path.stat() for path in files}
    identities = {
        name: (of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns) for name, of in found.items()
    }
    return msgspec.json.encode(identities), max(of.st_ctime for of in found.values())

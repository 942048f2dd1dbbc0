"""The end of an append-only file that a power failure left full of zeros."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

AOF_FOLDER, AOF_MANIFEST = "appendonlydir", "appendonly.aof.manifest"  # the server's own names

CHUNK = 1 << 20


def cut_zeros(folder: Path) -> None:
    """Cut zeros off the end of the newest append-only file in `folder`, as a machine leaves them that lost its power.

    A file that was written to its end ends in a line break. So zeros there are a place that the file system had made for
    a write which never came: no command that was answered, with `appendfsync always`, is among them. What they leave of a
    command is cut off by the server.
    """
    newest = newest_file(folder)
    if newest is None or not newest.is_file():
        return
    with open(newest, "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end and (kept := _last_but_zeros(file, end)) != end:
            end = kept
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


def newest_file(folder: Path) -> Path | None:
    """The one that is appended to; None before the server's first start."""
    manifest = folder / AOF_MANIFEST
    names = re.findall(r"^file (\S+) seq \d+ type i", manifest.read_text(), re.MULTILINE) if manifest.is_file() else []
    return folder / names[-1] if names else None


def _last_but_zeros(file: BinaryIO, end: int) -> int:
    """Where the last chunk before `end` ends without its zeros."""
    start = max(0, end - CHUNK)
    file.seek(start)
    return start + len(file.read(end - start).rstrip(b"\0"))

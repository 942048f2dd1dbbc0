"""Files that are wholly there after a crash, or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush a folder, everything in it, and their names."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def rename_durably(source: Path, target: Path) -> None:
    """Give a synced folder its final name."""
    source.rename(target)
    fsync(target.parent)

"""A checkpoint's manifest: which files it has, and their SHA-256. The manifest's own is kept in Redis."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from lachesis.broker.errors import CheckpointRefused
from lachesis.broker.records.versions import CheckpointManifest, FileInfo

CHECKPOINT_MANIFEST = "lachesis.json"
MAX_BYTES = 1 << 26  # of a manifest
THREADS = min(8, os.cpu_count() or 1)  # that hash files, which leaves the interpreter alone


def write_manifest(folder: Path, step: int) -> str:
    """Describe the files of a folder in its manifest, and return the manifest's digest."""
    paths = _files(folder)
    with ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(_sha256, paths.values())
        infos = [FileInfo(path.stat().st_size, digest) for path, digest in zip(paths.values(), digests, strict=True)]
    manifest = CheckpointManifest(step, dict(zip(paths, infos, strict=True)))
    raw = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
    (folder / CHECKPOINT_MANIFEST).write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def read_manifest(folder: Path) -> bytes:
    """Its bytes as they lie there; empty where there is none that can be read."""
    path = folder / CHECKPOINT_MANIFEST
    try:
        found = path.lstat()
        return path.read_bytes() if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES else b""
    except OSError:
        return b""


def check_files(folder: Path, raw: bytes) -> None:
    """Raise CheckpointRefused unless the folder holds what the manifest `raw`, which is believed, says, and nothing else."""
    manifest = msgspec.json.decode(raw, type=CheckpointManifest)
    paths = _files(folder)
    paths.pop(CHECKPOINT_MANIFEST, None)
    for name in sorted(paths.keys() | manifest.files.keys()):
        if name not in paths:
            raise CheckpointRefused(f"{str(folder / name)!r} is missing: the checkpoint was saved with it")
        if name not in manifest.files:
            raise CheckpointRefused(
                f"{str(folder / name)!r} is not in the checkpoint's manifest: it may hold only what was saved"
            )
        found = paths[name].lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointRefused(f"{str(folder / name)!r} is no regular file: what was saved is one")
        if found.st_size != (expected := manifest.files[name].bytes):
            raise CheckpointRefused(f"{str(folder / name)!r} has {found.st_size} bytes: it was saved with {expected}")
    with ThreadPoolExecutor(THREADS) as threads:
        for name, digest in zip(manifest.files, threads.map(_sha256, map(paths.get, manifest.files)), strict=True):
            if digest != (expected_digest := manifest.files[name].sha256):
                raise CheckpointRefused(
                    f"{str(folder / name)!r} has SHA-256 {digest}: it was saved with {expected_digest}"
                )


def _files(folder: Path) -> dict[str, Path]:
    """All that is no folder, by its name within this one."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

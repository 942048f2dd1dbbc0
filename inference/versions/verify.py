"""Is a published version what its event says, and can the running server load it?

SGLang dies of a torn file or a wrong shape, and takes missing tensors and NaNs without a word; so all of that is
checked before it sees the files.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lachesis.broker.errors import WeightsRefused
from lachesis.broker.records.versions import Manifest, TensorInfo, WeightsEntry
from lachesis.broker.weights.manifest import MANIFEST, MAX_MANIFEST, read_manifest
from lachesis.inference.versions.model_folder import ModelFolder
from lachesis.inference.versions.safetensors_reader import read_header, read_through
from lachesis.inference.versions.verification_cache import VerificationCache

_TIED = "lm_head.weight"


class VersionGone(LookupError):
    """The version's folder is not there: collected since its event, or not visible here (yet)."""


def folder_of(entry: WeightsEntry) -> Path:
    """Where the version lies; raises WeightsRefused for a URI that is neither a path nor a file URL."""
    try:
        parts = urlsplit(entry.uri)
    except ValueError as error:
        raise _refused(entry, f"{entry.uri!r} is no URL: {error}") from None
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
        raise _refused(entry, f"{entry.uri!r} is neither a path nor a file:// URL")
    return Path(unquote(parts.path) if parts.scheme else entry.uri)


def verify(entry: WeightsEntry, like: ModelFolder | None, verified: VerificationCache | None = None) -> Path:
    """The version's folder, once its manifest, its files and their tensors have been found in order.

    Args:
        like: the model the version has to fit: same tensors, same shapes. None: nothing to compare with yet.
        verified: where the agents of this machine tell each other whose contents were found in order. None: nowhere.

    Raises WeightsRefused with the reason, or VersionGone if there is no such folder.
    """
    folder = folder_of(entry)
    try:
        manifest = _verify(folder, entry, like)
        check = partial(_check_contents, folder, manifest)
        if verified is None:
            check()
        else:
            verified.check_once(entry.manifest_sha256, [folder / name for name in manifest.files], check)
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise VersionGone(f"version {entry.version}: {folder} does not exist") from None
        raise _refused(entry, f"{Path(str(error.filename)).name} is missing") from None
    except WeightsRefused as error:
        raise _refused(entry, str(error)) from None
    return folder


def _refused(entry: WeightsEntry, reason: str) -> WeightsRefused:
    return WeightsRefused(f"version {entry.version} refused: {reason}")


def _verify(folder: Path, entry: WeightsEntry, like: ModelFolder | None) -> Manifest:
    """All but the contents of the files."""
    with (folder / MANIFEST).open("rb") as file:
        raw = file.read(MAX_MANIFEST + 1)
    if hashlib.sha256(raw).hexdigest() != entry.manifest_sha256:
        raise WeightsRefused(f"{MANIFEST} is not the one that was published: its SHA-256 differs from the event's")
    manifest = read_manifest(raw)
    if manifest.version != entry.version:
        raise WeightsRefused(f"{MANIFEST} belongs to version {manifest.version}")

    for name, info in manifest.files.items():
        status = (folder / name).stat()
        if not stat.S_ISREG(status.st_mode):  # to read a pipe would wait for ever
            raise WeightsRefused(f"{name} is no file")
        if status.st_size != info.bytes:
            raise WeightsRefused(f"{name} has {status.st_size} bytes, the manifest says {info.bytes}")
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if stray := sorted(there - manifest.files.keys() - {MANIFEST}):  # SGLang would read them too
        raise WeightsRefused(f"{stray[0]!r} is not in the manifest")
    weights = {name for name in manifest.files if name.endswith(".safetensors")}

    found = {
        tensor: TensorInfo(file=name, shape=stored.shape, dtype=stored.dtype)
        for name in sorted(weights)
        for tensor, stored in read_header(folder / name)[0].items()
    }
    _compare(found, manifest.tensors, "the manifest")
    if like is not None:
        _compare_shapes({name: info.shape for name, info in found.items()}, like)
    return manifest


def _check_contents(folder: Path, manifest: Manifest) -> None:
    weights = {info.file for info in manifest.tensors.values()}
    for name, info in manifest.files.items():
        not_finite = None
        if name in weights:
            sha256, not_finite = read_through(folder / name)
        else:
            with (folder / name).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != info.sha256:
            raise WeightsRefused(f"the SHA-256 of {name} differs from the manifest's")
        if not_finite is not None:
            raise WeightsRefused(f"{not_finite} in {name} holds values that are not finite")


def _compare(found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], source: str) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise WeightsRefused(f"{missing[0]} is missing from the files, {source} lists it ({len(missing)} such tensors)")
    if extra := sorted(found.keys() - expected.keys()):
        raise WeightsRefused(f"{extra[0]} is in the files, {source} does not list it ({len(extra)} such tensors)")
    for name, info in found.items():
        if info != expected[name]:
            raise WeightsRefused(f"{name} is {info}, {source} says {expected[name]}")


def _compare_shapes(found: Mapping[str, tuple[int, ...]], like: ModelFolder) -> None:
    ignored = {_TIED} if like.tied else set()
    if missing := sorted(like.shapes.keys() - found.keys() - ignored):
        raise WeightsRefused(f"{missing[0]} is missing, the served model has it ({len(missing)} such tensors)")
    if extra := sorted(found.keys() - like.shapes.keys() - ignored):
        raise WeightsRefused(f"{extra[0]} is unknown to the served model ({len(extra)} such tensors)")
    for name, shape in found.items():
        if name in like.shapes and shape != like.shapes[name]:
            raise WeightsRefused(f"{name} has shape {shape}, the served model's has {like.shapes[name]}")

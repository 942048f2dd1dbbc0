"""What a published version may consist of: agents read its manifest before they believe anything else of it."""

from __future__ import annotations

import re

import msgspec

from lachesis.broker.errors import WeightsRefused
from lachesis.broker.records.versions import FileInfo, Manifest

MANIFEST = "manifest.json"
MAX_MANIFEST = 64 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")  # nothing that is code, or is unpickled
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WIDTHS = (1, 2, 4, 8)  # of a delta's elements
_decoder = msgspec.json.Decoder(Manifest)


def may_be_published(name: str) -> bool:
    """Whether a version may have a file of that name: weights, configuration, and what a tokenizer consists of."""
    return _NAME.fullmatch(name) is not None and name.endswith(_SUFFIXES) and name != MANIFEST


def read_manifest(raw: bytes) -> Manifest:
    """Raises WeightsRefused with the reason."""
    if len(raw) > MAX_MANIFEST:
        raise WeightsRefused(f"{MANIFEST} has more than {MAX_MANIFEST} bytes")
    try:
        manifest = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsRefused(f"{MANIFEST} can't be read: {error}") from None
    for name, info in manifest.files.items():
        if not may_be_published(name):
            raise WeightsRefused(
                f"{MANIFEST} names {name[:300]!r}: a file is named by up to 200 of A-Z a-z 0-9 _ . -, and ends with one of "
                + " ".join(_SUFFIXES)
            )
        _check(name, info)
    for name, delta in (manifest.base.deltas if manifest.base else {}).items():
        if name not in manifest.files:
            raise WeightsRefused(f"{MANIFEST} has a delta of {name[:300]!r}, which it does not list")
        if delta.width not in _WIDTHS:
            raise WeightsRefused(
                f"{MANIFEST} says that the elements of {name} have {delta.width} bytes, not 1, 2, 4 or 8"
            )
        _check(name, delta.file)
    return manifest


def _check(name: str, info: FileInfo) -> None:
    if info.bytes < 0 or not _SHA256.fullmatch(info.sha256):
        raise WeightsRefused(
            f"{MANIFEST} says of {name} that it has {info.bytes} bytes and SHA-256 {info.sha256[:80]!r}"
        )

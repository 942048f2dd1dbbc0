"""A file of weights as its difference to another version's: exact to the bit, whatever the values are.

The bytes of both files are XORed, the bytes of each element sorted by their place in it, and the result compressed. An
element that did not change is zeros; of one that changed a little sign, exponent and high mantissa are. So one encoding
holds a few changed elements and all of them, and knows no values: NaN payloads and -0.0 are bits like others.

Both files have the same size: versions of a model have the same tensors, so the same safetensors header before them,
which is padded to 8 bytes. Pieces of PIECE bytes are encoded one by one, so that memory is bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from lachesis.broker.errors import WeightsRefused
from lachesis.broker.records.versions import Delta, FileInfo

PIECE = 8 << 20  # bytes; a multiple of 8
LEVEL = 3


def write_delta(base: Path, new: Path, to: Path, *, width: int) -> Delta | None:
    """Encode `new` against `base` as the file `to`, its elements `width` bytes wide (1, 2, 4 or 8).

    None, and no file, where it would not be smaller than `new`, or the two differ in size.
    """
    size = new.stat().st_size
    if base.stat().st_size != size:
        return None
    hash_base, hash_new, hash_delta = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=size)
    written = 0
    with to.open("wb") as file:
        for old, fresh in zip(_pieces(base), _pieces(new), strict=True):
            hash_base.update(old)
            hash_new.update(fresh)
            packed = compressor.compress(_shuffle(_xor(old, fresh), width))
            hash_delta.update(packed)
            written += file.write(packed)
        packed = compressor.flush()
        hash_delta.update(packed)
        written += file.write(packed)
    if written >= size:
        to.unlink()
        return None
    return Delta(
        width=width,
        base_sha256=hash_base.hexdigest(),
        file=FileInfo(bytes=written, sha256=hash_delta.hexdigest()),
        whole=FileInfo(bytes=size, sha256=hash_new.hexdigest()),
    )


def apply_delta(base: Path, delta: Path, to: Path, told: Delta) -> None:
    """Write the file that `told` describes as `to`.

    Raises WeightsRefused with the reason, and leaves no `to`, where base or delta is another than `told` says, or gives
    something else; FileNotFoundError where one is missing.
    """
    _check(base, "base", told.whole.bytes, told.base_sha256)
    _check(delta, "delta", told.file.bytes, told.file.sha256)
    digest = hashlib.sha256()
    try:
        with delta.open("rb") as packed, to.open("wb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=False)
            for old in _pieces(base):
                shuffled = reader.read(len(old))
                if len(shuffled) != len(old):
                    raise WeightsRefused(f"the delta {delta.name} ends before its base does")
                fresh = _xor(old, _unshuffle(shuffled, told.width))
                digest.update(fresh)
                file.write(fresh)
            if reader.read(1):
                raise WeightsRefused(f"the delta {delta.name} goes on where its base ends")
        if digest.hexdigest() != told.whole.sha256:
            raise WeightsRefused(f"the delta {delta.name} on {base.name} gives another file than was published")
    except (WeightsRefused, zstandard.ZstdError, OSError) as error:
        to.unlink(missing_ok=True)
        if isinstance(error, zstandard.ZstdError):
            raise WeightsRefused(f"the delta {delta.name} can't be decompressed: {error}") from error
        raise


def _check(path: Path, what: str, size: int, sha256: str) -> None:
    if (found := path.stat().st_size) != size:
        raise WeightsRefused(f"the {what} {path.name} has {found} bytes, the manifest says {size}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise WeightsRefused(f"the SHA-256 of the {what} {path.name} differs from the manifest's")


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _xor(one: bytes, other: bytes) -> bytes:
    return np.bitwise_xor(_bytes(one), _bytes(other)).tobytes()


def _shuffle(piece: bytes, width: int) -> bytes:
    """First the first byte of every element, then the second, …; what is left over stays at the end."""
    whole = len(piece) // width * width
    return _bytes(piece)[:whole].reshape(-1, width).T.tobytes() + piece[whole:]


def _unshuffle(piece: bytes, width: int) -> bytes:
    whole = len(piece) // width * width
    return _bytes(piece)[:whole].reshape(width, -1).T.tobytes() + piece[whole:]


def _bytes(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(raw, dtype=np.uint8)

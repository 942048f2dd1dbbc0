"""Reading safetensors files with numpy alone: what a file holds, its hash, and whether its values are finite.

Format: 8 bytes with the header's length, the header as JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Struct

from lachesis.broker.errors import WeightsRefused

MAX_HEADER = 100 << 20  # bytes; the format's own limit
CHUNK = 1 << 20  # bytes looked at in one go, whole elements of any type: they fit into a core's cache

# A value is not finite if all bits of its exponent are set, so if it is, but for its sign, at least as large as a number
# of these bits; F8_E4M3 has no infinity, only this one NaN.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F64": (np.uint64, 0x7FF0 << 48),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}


# Bits of an element of each of the format's types.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8), **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32), **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

Size: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 48)]


class StoredTensor(Struct, frozen=True):
    """One tensor as a file's header describes it; offsets are bytes after the header."""

    dtype: str
    shape: Annotated[tuple[Size, ...], Meta(max_length=16)]
    data_offsets: tuple[Size, Size]


Tensors: TypeAlias = dict[str, StoredTensor]
_header = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_header(path: Path) -> tuple[Tensors, int]:
    """What the file holds, by name, and where its data begin. Raises WeightsRefused if it is torn or malformed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise WeightsRefused(f"{path.name}: {size} bytes are too few for its header: the file is torn")
        raw = file.read(length)
    try:
        tensors = {
            name: msgspec.json.decode(entry, type=StoredTensor)
            for name, entry in _header.decode(raw).items()
            if name != "__metadata__"
        }
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsRefused(f"{path.name}: its header is not one of a safetensors file: {error}") from None
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, stop = tensor.data_offsets
        if begin != end or stop < begin:
            raise WeightsRefused(f"{path.name}: tensor {name} lies at bytes {begin} to {stop}, expected from {end}")
        end = stop
        if math.prod(tensor.shape) * _BITS.get(tensor.dtype, 0) != 8 * (stop - begin):
            kind = f"type {tensor.dtype} and shape {tensor.shape}"
            raise WeightsRefused(f"{path.name}: tensor {name} of {kind} has {stop - begin} bytes")
    if 8 + length + end != size:
        raise WeightsRefused(f"{path.name}: {size} bytes, but its header describes {8 + length + end}")
    return tensors, 8 + length


def read_through(path: Path) -> tuple[str, str | None]:
    """SHA-256 of the file, and the name of its first tensor with a NaN or an infinity, in one reading.

    Integers and formats without either are finite. The bytes that are judged are those that were hashed, whatever
    somebody does to the file meanwhile. Raises WeightsRefused if it is torn or malformed.
    """
    tensors, start = read_header(path)
    not_finite, buffer = None, bytearray(CHUNK)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(start))
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):  # without gaps
            begin, stop = tensor.data_offsets
            kind, exponent = _EXPONENTS.get(tensor.dtype, (np.uint8, None))
            magnitude = kind(np.iinfo(kind).max >> 1)  # all but the sign
            for at in range(begin, stop, CHUNK):
                part = memoryview(buffer)[: min(CHUNK, stop - at)]
                if file.readinto(part) != len(part):
                    raise WeightsRefused(f"{path.name}: it became shorter while it was read")
                digest.update(part)
                if exponent is not None and not_finite is None:
                    bits = np.frombuffer(part, dtype=kind)
                    if np.bitwise_and(bits, magnitude, out=bits).max() >= exponent:
                        not_finite = name
        digest.update(file.read())  # nothing, unless it grew
    return digest.hexdigest(), not_finite

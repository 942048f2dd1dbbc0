"""Groups to bytes and back.

Packed, a group is zstd(msgpack) with its ragged fields as little-endian arrays (docs/packed.md): what clients may post,
and the larger part of what is stored. A blob is that, as it came, behind what is known only on arrival: id and
versions. Packing is lossless: integers take 4 bytes where all fit and 8 where not, log-probabilities 4 bytes where
every value is exactly a float32 (as those from an inference server are) and 8 where not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import zstandard
from msgspec import Struct

from lachesis.broker.errors import InvalidGroup
from lachesis.broker.records.body_limits import TooMany, check_msgpack
from lachesis.broker.records.entries import narrowed
from lachesis.broker.records.groups import Group, ScoredGroup, Spans

PACKED_TYPE = "application/vnd.lachesis.group"  # media type of a packed group
LARGEST = 1 << 29  # bytes of a packed group once it is decompressed: of no post and of no archive are more taken
_TRAINED = -1  # in the packed form this mask value and the token's own id trade places


class Ragged(Struct, array_like=True):
    dtype: str  # numpy's: "<i4", "<i8", "<f4", "<f8"
    lengths: bytes  # int32 per row
    values: bytes


class _Rest(Struct, omit_defaults=True):
    """The Atropos keys that no trainer computes with, as they came."""

    messages: list[list[dict[str, Any]]] | None = None
    generation_params: dict[str, Any] | None = None
    group_overrides: dict[str, Any] | None = None
    overrides: list[dict[str, Any]] | None = None
    images: Any = None
    distill_token_ids: list[list[list[int]]] | None = None
    distill_logprobs: list[list[list[float]]] | None = None


class _Packed(Struct):
    env: int | None
    tokens: Ragged
    masks: Ragged
    scores: bytes  # float64
    advantages: Ragged | None = None
    ref_logprobs: Ragged | None = None
    inference_logprobs: Ragged | None = None
    rest: _Rest = msgspec.field(default_factory=_Rest)
    weight_versions: list[Spans] | None = None


class _Opened(_Packed):
    """The same with what is nested left as MessagePack."""

    rest: msgspec.Raw = msgspec.Raw(b"\x80")  # type: ignore[assignment]
    weight_versions: msgspec.Raw = msgspec.Raw(b"\xc0")  # type: ignore[assignment]


class _Zstd(threading.local):
    """One thread's contexts, which take a while to make.

    Level -1 costs a fourth less than 1 to pack and half as much to unpack, for blobs a tenth larger.
    """

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=-1)
        self.decompressor = zstandard.ZstdDecompressor()


REST = _Rest.__struct_fields__
_UNREADABLE = (zstandard.ZstdError, msgspec.DecodeError, ValueError, RecursionError)
_zstd = _Zstd()
encoder = msgspec.msgpack.Encoder()
_opened_decoder = msgspec.msgpack.Decoder(_Opened)
_rest_decoder = msgspec.msgpack.Decoder(_Rest)
_versions_decoder = msgspec.msgpack.Decoder(list[Spans] | None)


def to_arrays(scored: ScoredGroup) -> Group:
    """The group as arrays, with no id and no versions yet. Raises InvalidGroup if an integer does not fit 64 bits."""
    return Group(
        env=scored.env_id,
        tokens=_int_rows("tokens", scored.tokens),
        masks=_int_rows("masks", scored.masks),
        scores=np.array(scored.scores, dtype="<f8"),
        advantages=_float_rows(scored.advantages),
        ref_logprobs=_float_rows(scored.ref_logprobs),
        inference_logprobs=_float_rows(scored.inference_logprobs),
        rest={name: value for name in REST if (value := getattr(scored, name)) is not None},
        versions=scored.weight_versions,
    )


def to_scored(group: Group) -> ScoredGroup:
    """The group as it was posted."""
    return ScoredGroup(
        tokens=_lists(group.tokens) or [],
        masks=_lists(group.masks) or [],
        scores=group.scores.tolist(),
        advantages=_lists(group.advantages),
        ref_logprobs=_lists(group.ref_logprobs),
        inference_logprobs=_lists(group.inference_logprobs),
        env_id=group.env,
        weight_versions=group.versions,
        **group.rest,
    )


def pack(group: ScoredGroup | Group) -> bytes:
    """The packed form: what a client posts as PACKED_TYPE.

    Raises InvalidGroup if an integer does not fit 64 bits, or the group is larger than could be read back.
    """
    if isinstance(group, ScoredGroup):
        group = to_arrays(group)
    tokens, masks = _narrow(group.tokens, "<i4"), _narrow(group.masks, "<i4")
    packed = _Packed(
        env=group.env,
        tokens=_ragged(group.tokens, tokens),
        masks=_ragged(group.masks, _trade(masks, tokens)),
        scores=group.scores.tobytes(),
        advantages=pack_floats(group.advantages),
        ref_logprobs=pack_floats(group.ref_logprobs),
        inference_logprobs=pack_floats(group.inference_logprobs),
        rest=_Rest(**group.rest),
        weight_versions=group.versions,
    )
    data = encoder.encode(packed)
    if len(data) > LARGEST:
        raise InvalidGroup("body", f"{len(data)} bytes", f"must not be larger than {LARGEST} bytes as arrays")
    return _zstd.compressor.compress(data)


def is_packed(body: bytes) -> bool:
    """Whether a posted body is a packed group and not JSON."""
    return body.startswith(zstandard.FRAME_HEADER)


def unpacked_bytes(packed: bytes) -> int:
    """Size of a packed group after decompression, as it says itself. Raises InvalidGroup if it does not."""
    try:
        size = zstandard.frame_content_size(packed)
    except zstandard.ZstdError:
        size = -1
    if size < 0:
        raise not_packed("must be one zstd frame that states its content size")
    return int(size)


def unpack(
    packed: bytes,
    max_bytes: int = LARGEST,
    max_lists: int | None = None,
    *,
    check: Callable[[bytes], None] | None = None,
    rest: bool = True,
) -> Group:
    """Decode a packed group; its arrays are read-only views of one buffer.

    Takes at most `unpacked_bytes` of memory for them. What is nested, and so may become far more, `check` is shown
    before, as MessagePack. Raises InvalidGroup where the bytes are not a packed group, say that they decompress to more
    than `max_bytes`, or hold more than `max_lists` lists and maps; that shapes agree and numbers make sense is for
    `admit` to see. Without `rest` the keys that no trainer computes with stay in `packed`.
    """
    if (size := unpacked_bytes(packed)) > max_bytes:
        raise InvalidGroup("body", f"{size} bytes", f"must not decompress to more than {max_bytes} bytes")
    try:
        data = _zstd.decompressor.decompress(packed, allow_extra_data=False)
        check_lists(data, max_lists)
        found = _opened_decoder.decode(data)
    except _UNREADABLE as error:
        raise not_packed(f"must be a packed group ({error})") from None
    if check:
        check(bytes(found.rest))
        check(bytes(found.weight_versions))
    try:
        more = _rest_decoder.decode(found.rest) if rest else _Rest()
        tokens, masks = _flat(found.tokens, "<i4", "<i8"), _flat(found.masks, "<i4", "<i8")
        return Group(
            env=found.env,
            tokens=_rows(found.tokens, tokens),
            masks=_rows(found.masks, _trade(masks, tokens)),
            scores=np.frombuffer(found.scores, dtype="<f8"),
            advantages=unpack_floats(found.advantages),
            ref_logprobs=unpack_floats(found.ref_logprobs),
            inference_logprobs=unpack_floats(found.inference_logprobs),
            rest={name: value for name in REST if (value := getattr(more, name)) is not None},
            versions=_versions_decoder.decode(found.weight_versions),
        )
    except _UNREADABLE as error:
        raise not_packed(f"must be a packed group ({error})") from None


def check_lists(data: bytes, most: int | None) -> None:
    if most is None:
        return
    try:
        check_msgpack(data, most)
    except TooMany as error:
        raise not_packed(f"must not hold more than {most} lists and maps ({error})") from None


def not_packed(rule: str) -> InvalidGroup:
    return InvalidGroup("body", "bytes", rule)


def _int_rows(name: str, rows: list[list[int]]) -> list[np.ndarray]:
    try:
        return [np.array(row, dtype="<i8") for row in rows]
    except OverflowError:
        worst = max((x for row in rows for x in row), key=abs)
        raise InvalidGroup(name, worst, "must fit a signed 64-bit integer") from None


def _float_rows(rows: list[list[float]] | None) -> list[np.ndarray] | None:
    return None if rows is None else [np.array(row, dtype="<f8") for row in rows]


def _narrow(rows: list[np.ndarray], dtype: str) -> np.ndarray:
    """The rows end to end, as `dtype` if that loses nothing."""
    return narrowed(np.concatenate(rows), dtype) if rows else np.zeros(0, dtype)


def _trade(masks: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Masks with the token's own id and -1 exchanged, so that the usual mask is two values; its own inverse."""
    if masks.shape != tokens.shape or not masks.dtype == tokens.dtype == "<i4":
        return masks
    return np.where(masks == tokens, np.int32(_TRAINED), np.where(masks == _TRAINED, tokens, masks))


def pack_floats(rows: list[np.ndarray] | None) -> Ragged | None:
    return None if rows is None else _ragged(rows, _narrow(rows, "<f4"))


def _ragged(rows: list[np.ndarray], values: np.ndarray) -> Ragged:
    return Ragged(values.dtype.str, np.array([len(row) for row in rows], "<i4").tobytes(), values.tobytes())


def _flat(ragged: Ragged, *dtypes: str) -> np.ndarray:
    if ragged.dtype not in dtypes:
        raise ValueError(f"dtype {ragged.dtype!r} where only {' and '.join(dtypes)} can be")
    return np.frombuffer(ragged.values, dtype=ragged.dtype)


def _rows(ragged: Ragged, values: np.ndarray) -> list[np.ndarray]:
    lengths = np.frombuffer(ragged.lengths, dtype="<i4").tolist()
    if sum(lengths) != len(values) or min(lengths, default=0) < 0:
        raise ValueError(f"rows of {sum(lengths)} values in all, and {len(values)} values")
    rows, start = [], 0
    for length in lengths:
        rows.append(values[start : start + length])
        start += length
    return rows


def unpack_floats(ragged: Ragged | None) -> list[np.ndarray] | None:
    return None if ragged is None else _rows(ragged, _flat(ragged, "<f4", "<f8"))


def _lists(rows: list[np.ndarray] | None) -> Any:
    return None if rows is None else [row.tolist() for row in rows]

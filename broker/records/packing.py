"""Groups to bytes and back.

Packed, a group is zstd(msgpack) with its ragged fields as little-endian arrays (docs/packed.md): what clients may post,
and the larger part of what is stored. A blob is that, as it came, behind what is known only on arrival: id and
versions. Packing is lossless: integers take 4 bytes where all fit and 8 where not, log-probabilities 4 bytes where
every value is exactly a float32 (as those from an inference server are) and 8 where not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import zstandard
from msgspec import Struct

from lachesis.broker.errors import InvalidGroup
from lachesis.broker.records.body_limits import TooMany, check_msgpack
from lachesis.broker.records.entries import narrowed
from lachesis.broker.records.groups import Group, GroupEntry, ScoredGroup, Spans

CODEC = "mp2z"
PACKED_TYPE = "application/vnd.lachesis.group"  # media type of a packed group
LARGEST = 1 << 29  # bytes of a packed group once it is decompressed: of no post and of no archive are more taken
_TRAINED = -1  # in the packed form this mask value and the token's own id trade places


class _Ragged(Struct, array_like=True):
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
    tokens: _Ragged
    masks: _Ragged
    scores: bytes  # float64
    advantages: _Ragged | None = None
    ref_logprobs: _Ragged | None = None
    inference_logprobs: _Ragged | None = None
    rest: _Rest = msgspec.field(default_factory=_Rest)
    weight_versions: list[Spans] | None = None


class _Opened(_Packed):
    """The same with what is nested left as MessagePack."""

    rest: msgspec.Raw = msgspec.Raw(b"\x80")  # type: ignore[assignment]
    weight_versions: msgspec.Raw = msgspec.Raw(b"\xc0")  # type: ignore[assignment]


class _Blob(Struct, array_like=True):
    gid: str
    v_min: int
    v_max: int
    packed: bytes
    versions: list[Spans] | None = None
    sampled_logprobs: _Ragged | None = None


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
_encoder = msgspec.msgpack.Encoder()
_opened_decoder = msgspec.msgpack.Decoder(_Opened)
_rest_decoder = msgspec.msgpack.Decoder(_Rest)
_versions_decoder = msgspec.msgpack.Decoder(list[Spans] | None)
_blob_decoder = msgspec.msgpack.Decoder(_Blob)


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
        advantages=_pack_floats(group.advantages),
        ref_logprobs=_pack_floats(group.ref_logprobs),
        inference_logprobs=_pack_floats(group.inference_logprobs),
        rest=_Rest(**group.rest),
        weight_versions=group.versions,
    )
    data = _encoder.encode(packed)
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
        raise _not_packed("must be one zstd frame that states its content size")
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
        _check_lists(data, max_lists)
        found = _opened_decoder.decode(data)
    except _UNREADABLE as error:
        raise _not_packed(f"must be a packed group ({error})") from None
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
            advantages=_unpack_floats(found.advantages),
            ref_logprobs=_unpack_floats(found.ref_logprobs),
            inference_logprobs=_unpack_floats(found.inference_logprobs),
            rest={name: value for name in REST if (value := getattr(more, name)) is not None},
            versions=_versions_decoder.decode(found.weight_versions),
        )
    except _UNREADABLE as error:
        raise _not_packed(f"must be a packed group ({error})") from None


def to_blob(
    packed: bytes,
    gid: str,
    *,
    v_min: int,
    v_max: int,
    versions: list[Spans] | None = None,
    sampled_logprobs: list[np.ndarray] | None = None,
) -> bytes:
    """What is kept of a group: its packed form, its id, and what is known of the making of its tokens (see Group)."""
    return _encoder.encode(_Blob(gid, v_min, v_max, packed, versions, _pack_floats(sampled_logprobs)))


def from_blob(blob: bytes, max_lists: int | None = None) -> Group:
    """A stored group. Raises InvalidGroup if the bytes are none, or hold more than `max_lists` lists and maps."""
    _check_lists(blob, max_lists)
    try:
        found = _blob_decoder.decode(blob)
        sampled = _unpack_floats(found.sampled_logprobs)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _not_packed(f"must be a stored group ({error})") from None
    group = unpack(found.packed, max_lists=max_lists)
    group.gid, group.v_min, group.v_max = found.gid, found.v_min, found.v_max
    group.sampled_logprobs = sampled
    if found.versions is not None:
        group.versions = found.versions
    return group


def queue_entry(group: Group, stored_bytes: int) -> GroupEntry:
    """The entry of a stored group, as PUT made it."""
    mean, deviation = _spread(group.scores.tolist())
    return GroupEntry(
        gid=group.gid,
        env="-" if group.env is None else str(group.env),
        n=len(group.tokens),
        tok=sum(map(len, group.tokens)),
        score_mean=mean,
        score_std=deviation,
        v_min=group.v_min,
        v_max=group.v_max,
        bytes=stored_bytes,
        codec=CODEC,
        longest=max(map(len, group.tokens)),
    )


def _spread(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; scaled, so that no square of a large score overflows."""
    scale = max(map(abs, scores)) or 1.0
    mean = sum(score / scale for score in scores) / len(scores)
    deviation = (sum((score / scale - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    return mean * scale, deviation * scale


def _check_lists(data: bytes, most: int | None) -> None:
    if most is None:
        return
    try:
        check_msgpack(data, most)
    except TooMany as error:
        raise _not_packed(f"must not hold more than {most} lists and maps ({error})") from None


def _not_packed(rule: str) -> InvalidGroup:
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


def _pack_floats(rows: list[np.ndarray] | None) -> _Ragged | None:
    return None if rows is None else _ragged(rows, _narrow(rows, "<f4"))


def _ragged(rows: list[np.ndarray], values: np.ndarray) -> _Ragged:
    return _Ragged(values.dtype.str, np.array([len(row) for row in rows], "<i4").tobytes(), values.tobytes())


def _flat(ragged: _Ragged, *dtypes: str) -> np.ndarray:
    if ragged.dtype not in dtypes:
        raise ValueError(f"dtype {ragged.dtype!r} where only {' and '.join(dtypes)} can be")
    return np.frombuffer(ragged.values, dtype=ragged.dtype)


def _rows(ragged: _Ragged, values: np.ndarray) -> list[np.ndarray]:
    lengths = np.frombuffer(ragged.lengths, dtype="<i4").tolist()
    if sum(lengths) != len(values) or min(lengths, default=0) < 0:
        raise ValueError(f"rows of {sum(lengths)} values in all, and {len(values)} values")
    rows, start = [], 0
    for length in lengths:
        rows.append(values[start : start + length])
        start += length
    return rows


def _unpack_floats(ragged: _Ragged | None) -> list[np.ndarray] | None:
    return None if ragged is None else _rows(ragged, _flat(ragged, "<f4", "<f8"))


def _lists(rows: list[np.ndarray] | None) -> Any:
    return None if rows is None else [row.tolist() for row in rows]

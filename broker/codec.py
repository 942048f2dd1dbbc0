"""Records to bytes and back.

A group's blob is zstd(msgpack): ragged integer and float fields as packed little-endian arrays, everything else as it
came. Packing is lossless: integers take 4 bytes where all fit and 8 where not, log-probabilities 4 bytes where every
value is exactly a float32 (as those from an inference server are) and 8 where not. Stream entries are text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import zstandard
from msgspec import Struct

from lachesis.broker.errors import InvalidGroup
from lachesis.broker.records import Group, ScoredGroup

CODEC = "mp1z"
GID_BYTES = 12
_MAX_BLOB = 1 << 30  # bytes after decompression; a guard against a hostile blob, not a quota

T = TypeVar("T", bound=Struct)


class _Ragged(Struct, array_like=True):
    dtype: str  # numpy's: "<i4", "<i8", "<f4", "<f8"
    lengths: bytes  # int32 per row
    values: bytes


class _Blob(Struct):
    gid: str
    env: int | None
    v_min: int
    v_max: int
    tokens: _Ragged
    masks: _Ragged
    scores: bytes  # float64
    advantages: _Ragged | None
    ref_logprobs: _Ragged | None
    inference_logprobs: _Ragged | None
    rest: dict[str, Any]


_REST = (
    "messages",
    "generation_params",
    "group_overrides",
    "overrides",
    "images",
    "distill_token_ids",
    "distill_logprobs",
)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Blob)


def gid_of(body: bytes) -> str:
    """The id of a group: a hash of its decompressed body, so a retried POST has the same one."""
    return hashlib.blake2b(body, digest_size=GID_BYTES).hexdigest()


def tokens_digest(tokens: Sequence[int] | np.ndarray) -> str:
    """The id under which a sequence's lineage is kept: a hash of its token ids (prompt and output)."""
    return hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=16).hexdigest()


def pack(group: ScoredGroup, gid: str, *, v_min: int, v_max: int) -> bytes:
    """Encode a group for storage. Raises InvalidGroup if an integer does not fit 64 bits."""
    blob = _Blob(
        gid=gid,
        env=group.env_id,
        v_min=v_min,
        v_max=v_max,
        tokens=_pack_ints("tokens", group.tokens),
        masks=_pack_ints("masks", group.masks),
        scores=np.asarray(group.scores, dtype="<f8").tobytes(),
        advantages=_pack_floats(group.advantages),
        ref_logprobs=_pack_floats(group.ref_logprobs),
        inference_logprobs=_pack_floats(group.inference_logprobs),
        rest={name: value for name in _REST if (value := getattr(group, name)) is not None},
    )
    return zstandard.ZstdCompressor(level=1).compress(_encoder.encode(blob))


def unpack(data: bytes) -> Group:
    """Decode a stored group; its arrays are read-only views of one buffer."""
    blob = _decoder.decode(zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_BLOB))
    return Group(
        gid=blob.gid,
        env=blob.env,
        v_min=blob.v_min,
        v_max=blob.v_max,
        tokens=_unpack(blob.tokens),
        masks=_unpack(blob.masks),
        scores=np.frombuffer(blob.scores, dtype="<f8"),
        advantages=_unpack_optional(blob.advantages),
        ref_logprobs=_unpack_optional(blob.ref_logprobs),
        inference_logprobs=_unpack_optional(blob.inference_logprobs),
        rest=blob.rest,
    )


def to_scored(group: Group) -> ScoredGroup:
    """The group as it was posted, for Atropos' `GET /batch` and `/latest_example`."""
    return ScoredGroup(
        tokens=_lists(group.tokens) or [],
        masks=_lists(group.masks) or [],
        scores=group.scores.tolist(),
        advantages=_lists(group.advantages),
        ref_logprobs=_lists(group.ref_logprobs),
        inference_logprobs=_lists(group.inference_logprobs),
        env_id=group.env,
        **group.rest,
    )


def to_entry(record: Struct) -> dict[str, str]:
    """A record as stream fields: readable text; tuples of words are joined by spaces."""
    return {name: _text(getattr(record, name)) for name in record.__struct_fields__}


def from_entry(kind: type[T], fields: Mapping[bytes, bytes], **more: Any) -> T:
    """The record of a stream entry; `more` adds what the entry's id says."""
    values: dict[str, Any] = {key.decode(): value.decode() for key, value in fields.items()} | more
    for field in msgspec.structs.fields(kind):
        if field.type == tuple[str, ...] and isinstance(values.get(field.name), str):
            values[field.name] = tuple(values[field.name].split())
    return msgspec.convert(values, kind, strict=False)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def _pack_ints(name: str, rows: list[list[int]]) -> _Ragged:
    try:
        values = _flat(rows, "<i8")
    except OverflowError:
        worst = max((x for row in rows for x in row), key=abs)
        raise InvalidGroup(name, worst, "must fit a signed 64-bit integer") from None
    narrow = values.astype("<i4")
    return _ragged(rows, narrow if np.array_equal(narrow, values) else values)


def _pack_floats(rows: list[list[float]] | None) -> _Ragged | None:
    if rows is None:
        return None
    values = _flat(rows, "<f8")
    with np.errstate(over="ignore"):
        narrow = values.astype("<f4")
    return _ragged(rows, narrow if np.array_equal(narrow, values) else values)


def _flat(rows: Sequence[Sequence[float]], dtype: str) -> np.ndarray:
    return np.fromiter((x for row in rows for x in row), dtype=dtype, count=sum(map(len, rows)))


def _ragged(rows: Sequence[Sequence[float]], values: np.ndarray) -> _Ragged:
    lengths = np.fromiter(map(len, rows), dtype="<i4", count=len(rows))
    return _Ragged(values.dtype.str, lengths.tobytes(), values.tobytes())


def _unpack(ragged: _Ragged) -> list[np.ndarray]:
    lengths = np.frombuffer(ragged.lengths, dtype="<i4")
    values = np.frombuffer(ragged.values, dtype=ragged.dtype)
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _unpack_optional(ragged: _Ragged | None) -> list[np.ndarray] | None:
    return None if ragged is None else _unpack(ragged)


def _lists(rows: list[np.ndarray] | None) -> Any:
    return None if rows is None else [row.tolist() for row in rows]

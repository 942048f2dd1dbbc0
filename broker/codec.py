"""Ids, and records to the text of stream entries and back. Groups to bytes: packing.py."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

GID_BYTES = 12
_INT32 = np.dtype("<i4")  # to compare with a name takes longer

T = TypeVar("T", bound=Struct)


def gid_of(body: bytes) -> str:
    """The id of a group: a hash of its decompressed body, so a retried POST has the same one.

    A fast hash: it tells posts apart, and guards against nobody. Who may post could spoil the run in easier ways.
    """
    import xxhash  # the environment of SGLang's agents, who need no ids, does not have it

    return xxhash.xxh3_128_hexdigest(body)[: 2 * GID_BYTES]


def tokens_digest(tokens: Sequence[int] | np.ndarray) -> str:
    """The id under which a sequence's lineage is kept: a hash of its token ids (prompt and output)."""
    values = narrowed(np.asarray(tokens, dtype=None if len(tokens) else "<i4"), "<i4")
    digest = hashlib.sha256(values.tobytes())
    digest.update(values.dtype.str.encode())
    return digest.hexdigest()[:32]


def prefix_digests(tokens: np.ndarray, ends: Sequence[int]) -> list[str]:
    """`tokens_digest` of tokens[:end] for each of the growing `ends`, in one pass."""
    values = tokens if tokens.dtype == _INT32 else narrowed(tokens, "<i4")
    if values.dtype != _INT32:
        return [tokens_digest(tokens[:end]) for end in ends]
    digest, start, found = hashlib.sha256(), 0, []
    for end in ends:
        digest.update(np.ascontiguousarray(values[start:end]).data)
        start, one = end, digest if end == ends[-1] else digest.copy()
        one.update(b"<i4")
        found.append(one.hexdigest()[:32])
    return found


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values as `dtype` where that loses nothing, else as they are."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = values.astype(dtype)
    return narrow if np.array_equal(narrow, values) else values


def to_entry(record: Struct) -> dict[str, str]:
    """A record as stream fields: readable text; tuples of words are joined by spaces."""
    return {name: _text(getattr(record, name)) for name in record.__struct_fields__}


@cache
def _word_lists(kind: type[Struct]) -> tuple[str, ...]:
    """The fields that are tuples of words; to look that up takes longer than all the rest."""
    return tuple(field.name for field in msgspec.structs.fields(kind) if field.type == tuple[str, ...])


def from_entry(kind: type[T], fields: Mapping[bytes, bytes], **more: Any) -> T:
    """The record of a stream entry; `more` adds what the entry's id says."""
    values: dict[str, Any] = {key.decode(): value.decode() for key, value in fields.items()} | more
    for name in _word_lists(kind):
        if isinstance(values.get(name), str):
            values[name] = tuple(values[name].split())
    return msgspec.convert(values, kind, strict=False)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)

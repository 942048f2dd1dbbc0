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

T = TypeVar("T", bound=Struct)


def gid_of(body: bytes) -> str:
    """The id of a group: a hash of its decompressed body, so a retried POST has the same one."""
    return hashlib.sha256(body).hexdigest()[: 2 * GID_BYTES]


def tokens_digest(tokens: Sequence[int] | np.ndarray) -> str:
    """The id under which a sequence's lineage is kept: a hash of its token ids (prompt and output)."""
    return hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()[:32]


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

"""Ids, and records to the text of stream entries and back. Groups to bytes: packing.py."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeVar

import msgspec
import numpy as np
import structlog
from msgspec import Struct

from lachesis.broker.errors import Unreadable

GID_BYTES = 12
IDS = 1 << 20  # see id_number
SHOWN = 300  # characters of a record that are repeated in an error
_INT32 = np.dtype("<i4")  # to compare with a name takes longer

T = TypeVar("T", bound=Struct)


def gid_of(body: bytes) -> str:
    """The id of a group: a hash of its decompressed body, so a retried POST has the same one.

    A fast hash: it tells posts apart, and guards against nobody. Who may post could spoil the run in easier ways.
    """
    import xxhash  # the environment of SGLang's agents, who need no ids, does not have it

    return xxhash.xxh3_128_hexdigest(body)[: 2 * GID_BYTES]


def id_number(gid: str) -> int:
    """What the id of an accepted group adds to the counter `ids`: 24 bits of its hash, signed, above 20 bits that hold 1.

    So a sum tells how many ids are in it, modulo IDS, and is another one, all but surely, where they are others.
    """
    import xxhash

    return ((xxhash.xxh3_64_intdigest(gid.encode()) >> 40) - 2**23) * IDS + 1


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


def flat_entry(record: Struct) -> list[str]:
    """The same as XADD takes it: fields and values in turn."""
    return [text for pair in to_entry(record).items() for text in pair]


@cache
def _word_lists(kind: type[Struct]) -> tuple[str, ...]:
    """The fields that are tuples of words; to look that up takes longer than all the rest."""
    return tuple(field.name for field in msgspec.structs.fields(kind) if field.type == tuple[str, ...])


def from_entry(kind: type[T], fields: Mapping[bytes, bytes], **more: Any) -> T:
    """The record of a stream entry; `more` adds what the entry's id says.

    Fields of other versions are passed over. Raises Unreadable if one that is needed is missing or malformed.
    """
    try:
        values: dict[str, Any] = {key.decode(): value.decode() for key, value in fields.items()} | more
        for name in _word_lists(kind):
            if isinstance(values.get(name), str):
                values[name] = tuple(values[name].split())
        return msgspec.convert(values, kind, strict=False)
    except ValueError as error:  # msgspec's, and that of text that is no UTF-8
        raise Unreadable(f"{kind.__name__} {str(dict(fields))[:SHOWN]}: {error}") from error


def from_json(kind: type[T], raw: bytes) -> T:
    """The record in a field of a hash. Raises Unreadable as `from_entry` does."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except ValueError as error:
        raise Unreadable(f"{kind.__name__} {raw[:SHOWN]!s}: {error}") from error


def read_json(kind: type[T], raw: bytes | None) -> T | None:
    """The same where a record may be missing: None, and one that can't be read counts as missing, too, and is told."""
    try:
        return from_json(kind, raw) if raw else None
    except Unreadable as error:
        warn_once(str(error))
        return None


def read_number(value: bytes | None) -> int:
    """A counter or a mark; 0 if there is none, or what is there is no integer."""
    try:
        return int(value or 0)
    except ValueError:
        warn_once(f"no integer: {str(value)[:SHOWN]}")
        return 0


def read_seconds(value: bytes) -> float:
    """A time that is kept, in seconds since 1970; long ago if it can't be read."""
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def read_entries(kind: type[T], found: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[tuple[bytes, T]]:
    """(id, record) of stream entries. Those that can't be read are passed over and told."""
    records = []
    for id_, fields in found:
        try:
            records.append((id_, from_entry(kind, fields)))
        except Unreadable as error:
            warn_once(f"{id_.decode()}: {error}")
    return records


@lru_cache(maxsize=1000)
def warn_once(what: str) -> None:
    """Log what was passed over, not at every look."""
    warn("unreadable, passed over", record=what)


def warn(event: str, **what: object) -> None:
    """Log to stderr, also where a command has set up no logging."""
    structlog.wrap_logger(structlog.PrintLogger(sys.stderr)).warning(event, **what)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)

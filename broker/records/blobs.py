"""What is stored of a group: its packed form behind its id and versions, and its entry in the queue."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import Struct

from lachesis.broker.records.groups import Group, GroupEntry, Spans
from lachesis.broker.records.packing import Ragged, check_lists, encoder, not_packed, pack_floats, unpack, unpack_floats

CODEC = "mp2z"


class _Blob(Struct, array_like=True):
    gid: str
    v_min: int
    v_max: int
    packed: bytes
    versions: list[Spans] | None = None
    sampled_logprobs: Ragged | None = None


_blob_decoder = msgspec.msgpack.Decoder(_Blob)


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
    return encoder.encode(_Blob(gid, v_min, v_max, packed, versions, pack_floats(sampled_logprobs)))


def from_blob(blob: bytes, max_lists: int | None = None) -> Group:
    """A stored group. Raises InvalidGroup if the bytes are none, or hold more than `max_lists` lists and maps."""
    check_lists(blob, max_lists)
    try:
        found = _blob_decoder.decode(blob)
        sampled = unpack_floats(found.sampled_logprobs)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise not_packed(f"must be a stored group ({error})") from None
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

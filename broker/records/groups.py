"""The records that rooms exchange. No logic: how they become bytes is entries.py, how they move is the rest of the broker.

Records named `…Entry` are stream entries: every field becomes readable text (see codec.to_entry). Of what another version
wrote, fields that are not named here are passed over. A field without a default is needed: a record that lacks it is
passed over and told once (codec.read_entries, codec.read_json), or raises Unreadable. A sequence is one
token list; a group is the sequences of one prompt; a step is one optimizer step of a policy, counted from 1; version v
is the weights after step v, and version 0 the weights training started from.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import numpy as np
from msgspec import Meta, Struct

Spans: TypeAlias = tuple[tuple[int, int, int], ...]  # (version, start, end): tokens start to end - 1, in order
DUPLICATE_WINDOW_S = (
    900  # for so long a repeated post is a retry: atroposlib's third and last begins some 630 s after the first
)
LONGEST_WINDOW_S = 24 * 3600  # that it may be set to; a replay's
AGAIN = "~"  # between a post's id and what tells its groups apart, where one is still kept and the next is accepted
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]


class ScoredGroup(Struct):
    """One rollout group as Atropos environments post it: upstream's 14 keys, absent ones null, and one that it ignores.

    Lists are parallel over the group's G sequences; token-level ones are aligned with `tokens`, without a shift.
    """

    tokens: list[list[int]]
    masks: list[list[int]]  # -100 where not trained, any other integer (by custom the token id) where trained
    scores: list[float]
    advantages: list[list[float]] | None = None
    ref_logprobs: list[list[float]] | None = None
    messages: list[list[dict[str, Any]]] | None = None
    generation_params: dict[str, Any] | None = None
    inference_logprobs: list[list[float]] | None = None  # nats; 1.0 marks "none here"
    group_overrides: dict[str, Any] | None = None
    overrides: list[dict[str, Any]] | None = None
    images: Any = None
    env_id: int | None = None
    distill_token_ids: list[list[list[int]]] | None = None
    distill_logprobs: list[list[list[float]]] | None = None
    weight_versions: list[Spans] | None = None  # where the environment knows them: over each sequence's tokens


class Group(Struct, kw_only=True):
    """A group as arrays, as a trainer reads it: ragged fields are lists of G one-dimensional arrays."""

    gid: str = ""
    env: int | None
    v_min: int = -1  # oldest and newest version that produced tokens of this group; -1 until it is stored
    v_max: int = -1
    tokens: list[np.ndarray]  # int32 or int64
    masks: list[np.ndarray]  # int32 or int64
    scores: np.ndarray  # float64, shape (G,)
    advantages: list[np.ndarray] | None
    ref_logprobs: list[np.ndarray] | None
    inference_logprobs: list[np.ndarray] | None  # float32 or float64
    rest: dict[str, Any]  # the remaining Atropos keys, as they came
    versions: list[Spans] | None = None  # which version produced which tokens of each sequence, where that is known
    sampled_logprobs: list[np.ndarray] | None = (
        None  # float32: the sampler's, 1.0 where not known; None if posted ones are
    )


class GroupEntry(Struct, frozen=True, kw_only=True):
    """One accepted, not yet batched group (stream `groups`). One that can't be read becomes a dead letter (see refit.py)."""

    gid: str
    env: str  # env id, or "-" where the environment did not say
    n: Positive  # sequences
    tok: Count  # tokens
    score_mean: float = 0.0
    score_std: float = 0.0
    v_min: int
    v_max: int
    bytes: Count  # of the stored blob
    codec: str = ""
    longest: int = 0  # tokens of its longest sequence; 0: not known


class Limits(Struct, frozen=True):
    """How much may wait in the queue when a group is put; 0: no limit."""

    bytes: int = 0  # stored bytes
    sequences: int = 0
    env_bytes: int = 0  # the same for each environment
    env_sequences: int = 0
    max_lag: int | None = None  # steps between a group's oldest version and its training; None: as last time
    policy: str = "main"  # whose steps and versions those are


class DeadEntry(Struct, frozen=True):
    """An accepted group that could not be trained (stream `dead`), or a post that was not accepted (`refused`), or a
    sequence that its group was trained without (`refused` too, gid `<gid>/<sequence>`).
    """

    gid: str
    reason: str  # one of dead.REASONS; of a post: invalid; of a sequence: untrainable
    deliveries: int  # how often its batch was lent
    detail: str


class RefusedEntry(DeadEntry, frozen=True):
    """A letter of the stream `refused`; what is kept of a post is in its blob, compressed."""

    kept: Count = 0  # bytes of that blob
    size: Count = 0  # of the whole body


class Lineage(Struct, frozen=True, omit_defaults=True):
    """What the front door knows of one finished generation: which versions made its output."""

    v_min: int
    v_max: int
    spans: Spans  # over output tokens
    log_probs: bytes = b""  # float32 of each output token as it was sampled, packed, in nats; empty: not known

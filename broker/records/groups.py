"""The records that rooms exchange. No logic: how they become bytes is entries.py, how they move is the rest of the broker.

Records named `…Entry` are stream entries: every field becomes readable text (see codec.to_entry). Of what another version
wrote, fields that are not named here are passed over. A field without a default is needed: a record that lacks it is
passed over and told once (codec.read_entries, codec.read_json), or raises Unreadable. A sequence is one
token list; a group is the sequences of one prompt; a step is one optimizer step of a policy, counted from 1; version v
is the weights after step v, and version 0 the weights training started from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from msgspec import Meta, Struct, field

Spans: TypeAlias = tuple[tuple[int, int, int], ...]  # (version, start, end): tokens start to end - 1, in order
DUPLICATE_WINDOW_S = (
    900  # for so long a repeated post is a retry: atroposlib's third and last begins some 630 s after the first
)
LONGEST_WINDOW_S = 24 * 3600  # that it may be set to; a replay's
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]
MAX_DELIVERIES = 10  # a batch lent more often than this without being committed is given up


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


class BatchEntry(Struct, frozen=True):
    """The groups of one optimizer step (stream `batches`, id `<step>-0`)."""

    step: int
    gids: tuple[str, ...]
    n: Positive
    tok: int
    v_min: int
    v_max: int
    formed_at: float  # seconds since the epoch
    bytes: int = 0  # of its groups as stored


class Lease(Struct, frozen=True):
    """A batch lent to one consumer; `deliveries` counts how often it has been lent."""

    batch: BatchEntry
    consumer: str
    deliveries: int


class LedgerEntry(Struct, frozen=True):
    """One trained step (stream `ledger:<policy>`): what went in, what came out. A trainer replays it by its groups alone."""

    step: int
    gids: tuple[str, ...]
    n: int = 0
    tok: int = 0
    v_before: int = -1
    v_after: int = -1
    v_min: int = -1
    lag: int = 0  # versions from v_min to the weights trained: v_before - v_min, and of a shadow's see trainer/data/policy_lag.py
    replica: str = ""
    reward: float = 0.0
    loss: float = 0.0
    seconds: float = 0.0
    at: float = 0.0


class Membership(Struct, frozen=True):
    """One life of a replica of a policy, in one epoch of one generation (see members.py)."""

    policy: str
    id: str
    generation: int
    epoch: int


class Member(Struct, frozen=True):
    """A living replica, as Redis knows it."""

    id: str
    step: int  # that its weights are at, -1 before it has any of use
    holds: int  # groups of the open step that it claimed
    trained: int  # groups of committed steps
    voted: bool  # whether it holds the open step's gradients
    heartbeat: float  # seconds since the epoch
    joined: float  # likewise


class WeightsEntry(Struct, frozen=True):
    """One published version (stream `weights:<policy>`, id `<version>-1`)."""

    version: int
    step: int
    uri: str
    manifest_sha256: str
    bytes: int
    dtype: str
    parent: int


class TensorInfo(Struct, frozen=True):
    file: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: F32, BF16, …


class FileInfo(Struct, frozen=True):
    bytes: int
    sha256: str


class Delta(Struct, frozen=True):
    """How one file of a version follows from the file of the same name of its base."""

    width: int  # bytes of an element
    base_sha256: str
    file: FileInfo  # the encoded difference
    whole: FileInfo  # the file that it gives


class Base(Struct, frozen=True):
    """The version that a version's deltas are to."""

    version: int
    uri: str
    manifest_sha256: str
    deltas: dict[str, Delta]  # by file; `<file>.delta` lies in its place


class Manifest(Struct, frozen=True):
    """What a published version consists of; `manifest.json` beside the files."""

    version: int
    step: int
    files: dict[str, FileInfo]
    tensors: dict[str, TensorInfo]
    base: Base | None = None  # None: all files lie there whole


class CheckpointManifest(Struct, frozen=True):
    """What a checkpoint consists of; `lachesis.json` beside the files."""

    step: int
    files: dict[str, FileInfo]


class TrainerConfig(Struct, frozen=True):
    """What a trainer registers: Atropos' `/register` body. `batch_size` counts sequences."""

    wandb_group: str
    wandb_project: str
    batch_size: int
    max_token_len: int
    checkpoint_dir: str
    save_checkpoint_interval: int
    starting_step: int
    num_steps: int


class KeptConfiguration(Struct, frozen=True):
    """What a policy is trained with (hash `settings`, field `trainer:<policy>`), for one more trainer like it."""

    overrides: tuple[str, ...] = ()  # as they were given; folders by their whole path, without the replica's name
    state_dir: str = ""
    resolved: str = ""  # YAML: what those made of every setting that is read


class EnvConfig(Struct, frozen=True):
    """What an environment registers: Atropos' `/register-env` body."""

    max_token_length: int
    desired_name: str
    weight: float
    group_size: int
    min_batch_allocation: float | None = None


class EnvRecord(Struct, frozen=True):
    env_id: int
    name: str  # "<desired_name>_<k>"
    config: EnvConfig
    connected: bool = True
    registered_at: float = 0.0
    heard_at: float = 0.0  # when it last called, to within a few seconds
    owner: str = ""  # name of the token that it registered with; empty: any may act for it


class ServerStatus(Struct, frozen=True):
    """Heartbeat of one inference server, kept by its agent (hash `pools`)."""

    server: str
    pool: str
    url: str
    state: str  # starting | ready | updating | draining | failed
    version: int  # served now; -1 before the first
    loading: int  # a version being read from the store now, -1 if none: the collector leaves it alone
    heartbeat: float
    updates: int = 0
    last_update_s: float = 0.0
    last_error: str = ""
    vocab_size: int = 0  # token ids are below it; 0 before the first model is loaded
    rule: str = "newest"  # its part of the pool's rule: newest | pin | canary | rest
    checksum: str = ""  # SGLang's, of the weights it serves; equal where the weights are
    prefix_key: str = ""  # of these weights, where cached prefixes of others stay in its cache; no load gets it again


class PoolRule(Struct, frozen=True):
    """Which version the servers of a pool serve (stream `rule:<pool>`; the newest entry is the rule)."""

    mode: str  # newest | pin | canary
    version: int = -1  # pin: everybody's; canary: that of a share of the servers
    rest: int = -1  # canary: everybody else's
    share: float = 0.0  # canary: of the pool's live servers


class ArchiverStatus(Struct, frozen=True):
    """Heartbeat of the process that archives a run (field `archiver` of the hash `state`)."""

    who: str  # host:pid
    url: str
    policy: str  # whose trained batches are archived
    bytes: int  # written since it started
    heartbeat: float


class QueueStatus(Struct, frozen=True):
    """Counters kept by the scripts: what is accepted and not yet delivered to a trainer."""

    groups: int
    sequences: int
    bytes: int
    accepted: int
    formed: int  # newest step formed
    delivered: int  # newest step a trainer was given
    waiting: dict[str, dict[int, int]]  # number of groups not yet in a batch, by environment ("-": none) and sequences
    dead: int = 0  # accepted groups among the dead letters now
    purged: int = 0  # dead letters given up, ever
    untrainable: int = 0  # sequences that their groups were trained without, ever
    refused: int = 0  # posts that were refused, ever
    refused_not_kept: int = 0  # of those: only counted, because Redis had no room to spare
    dropped: dict[str, int] = field(default_factory=dict)  # groups that ever became dead letters, by reason
    duplicates: dict[str, int] = field(
        default_factory=dict
    )  # posts ever dropped as repeats, by environment ("-": none)


class Lineage(Struct, frozen=True, omit_defaults=True):
    """What the front door knows of one finished generation: which versions made its output."""

    v_min: int
    v_max: int
    spans: Spans  # over output tokens
    log_probs: bytes = b""  # float32 of each output token as it was sampled, packed, in nats; empty: not known


Role = Literal["environment", "trainer", "admin"]


class TokenRecord(Struct, frozen=True):
    """What is kept of one bearer token (hash `tokens`, by name): never the token itself."""

    name: str
    role: Role
    sha256: str  # of the token, in hex
    created_at: float
    revoked_at: float | None = None

"""Records of a step's way: the batch, its lease, what the ledger keeps of it, and the replicas that train it."""

from __future__ import annotations

from msgspec import Struct, field

from lachesis.broker.records.groups import Positive

MAX_DELIVERIES = 10  # a batch lent more often than this without being committed is given up


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

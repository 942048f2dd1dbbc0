"""What the loop of one of several replicas (replica.py) needs of those who publish, save and report; and what all agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lachesis.broker.records.groups import DeadEntry
from lachesis.broker.records.steps import LedgerEntry, Membership
from lachesis.broker.replicas.members import Rendezvous
from lachesis.trainer.config.rules import Backend
from lachesis.trainer.writer_lock import WriterLease


class LeaderTasks(Protocol):
    """What only one replica does; each may be repeated by another one that took over in the middle of it."""

    def resume(self, writer_lease: WriterLease) -> int:
        """Bring the weights in memory from the newest checkpoint to the end of the ledger; the step it ends at."""

    def met(self, rendezvous: Rendezvous, me: Membership) -> None:
        """The replicas of an epoch know each other."""

    def follow_up(self, step: int) -> None:
        """Publish and save what is due with step `step`, which is committed and in memory; all that is still missing."""

    def opened(self, step: int) -> None:
        """The groups of a step are laid out for the replicas; called again by one that takes over."""

    def settle(self) -> None:
        """Before the next step may be committed: what it makes unrepeatable must be done."""

    def report(self, trained: StepRecord) -> None:
        """Tell of a step that is committed and applied; called before its `follow_up`, which may free its groups."""

    def finish(self, step: int) -> None:
        """Leave what a later process goes on from; the weights in memory are those of `step`."""

    def resign(self) -> None:
        """Another replica is the first one now, or this one is gone."""


@dataclass(frozen=True)
class StepRecord:
    """One committed step, as the replica saw it that tells of it."""

    entry: LedgerEntry
    letters: Sequence[DeadEntry]
    told: Sequence[bytes]
    groups: int  # of them its own
    replicas: int
    since: float  # time.perf_counter() when the step before was done
    wait_s: float  # from then until this one was open
    reduce_s: float  # from the end of its own groups to the sums
    vote_s: float


@dataclass(frozen=True)
class ElasticConfig:
    """What all replicas of a policy agree on."""

    policy: str
    batch_size: int
    num_steps: int
    silent_s: float  # a replica without a heartbeat for so long is taken out
    hold_s: float  # after such a silence of all of them a checkpoint is gone back to
    max_deliveries: int = 10
    shadow: bool = False  # whether batches are formed by the trainers of another policy
    prefetch: bool = True  # whether a batch is formed before the step before it is committed
    together_s: float = 0.5  # groups are trained several at once where that takes less, else one by one
    backend: Backend = "gloo"  # what their sums go over

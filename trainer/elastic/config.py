"""What all replicas of a policy agree on, and what each keeps of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lachesis.broker.records.groups import DeadEntry
from lachesis.broker.records.steps import BatchEntry, Membership
from lachesis.broker.replicas.members import Rendezvous
from lachesis.trainer.config.rules import Backend


@dataclass
class StepRecord:
    """One step, from its batch to its commit, as this replica sees it. Times are of time.perf_counter()."""

    batch: BatchEntry
    me: Membership
    rendezvous: Rendezvous
    began: float
    computed: float = 0.0  # its own groups
    reduced: float = 0.0  # those of all
    voted: float = 0.0
    own_groups: int = 0
    digest: str = ""  # of the sums
    told: Sequence[bytes] = ()  # of each group
    letters: Sequence[DeadEntry] = ()


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

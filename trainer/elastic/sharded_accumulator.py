"""The GradientAccumulator (see accumulator.py) of a replica that is several ranks: each holds a shard, and sums it with its like.

Rank 0 leads, as in distributed.py: it alone runs the replica's loop (replica.py), and here it has the others do what it does. A
rank's shard of gradients and weights goes to the same rank of the other replicas, over connections of its own; so all
replicas of a policy need as many ranks. What fails on one rank fails on all: they agree after each exchange.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

from lachesis.broker import BlockingBroker, LachesisError, connect_blocking
from lachesis.broker.errors import Moved
from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.broker.records.steps import BatchEntry, LedgerEntry, Membership
from lachesis.trainer.config.rules import Backend
from lachesis.trainer.elastic.collectives.base import Alone, PeerLost, Reducer, Watch
from lachesis.trainer.elastic.collectives.rendezvous import connect
from lachesis.trainer.elastic.group_accumulator import GroupAccumulator
from lachesis.trainer.elastic.membership import EPOCH_POLL_S
from lachesis.trainer.engine.distributed import LEADER, Ranks

T = TypeVar("T")


class ShardedAccumulator:
    """On rank 0, whose methods are the GradientAccumulator's; `orders` are the others' part of each."""

    def __init__(self, mine: GroupAccumulator, ranks: Ranks, url: str, run: str, backend: Backend) -> None:
        self._mine, self._ranks, self._url, self._run, self._backend = mine, ranks, url, run, backend
        self.orders: dict[str, Callable[..., Any]] = {
            name: getattr(self, name)
            for name in ("connect", "disconnect", "accumulate", "reduce", "clear", "apply", "give", "get")
        }
        self._shard: Reducer = Alone()  # of a rank that is not the leader
        self._sums: list[Tensor] = []  # likewise
        self._watch: Watch = lambda: None
        self._parts = ExitStack()
        self._broker: BlockingBroker | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return self._mine.metrics

    @property
    def pristine(self) -> bool:
        return self._mine.pristine

    @property
    def _leads(self) -> bool:
        return self._ranks.rank == LEADER

    def connect(self, me: Membership, rank: int, world: int, url: str = "", run: str = "") -> None:
        self._ranks.order("connect", me, rank, world, self._url, self._run)

        def shard() -> None:
            if self._broker is None:
                self._broker = self._parts.enter_context(connect_blocking(url, run))
            self._watch = _watching(self._broker, me)
            self._shard = connect(self._backend, self._broker, me, rank, world, self._watch, shard=self._ranks.rank)

        self._agree(shard if not self._leads else lambda: None)

    def disconnect(self) -> None:
        self._ranks.order("disconnect")
        self._shard.close()
        self._shard = Alone()

    def accumulate(self, batch: BatchEntry, claimed: Sequence[tuple[int, Group]]) -> list[bytes]:
        self._ranks.order("accumulate", batch, list(claimed))
        return self._mine.accumulate(batch, claimed)

    def reduce(
        self, reducer: Reducer | None = None, told: Tensor | None = None, watch: Watch | None = None
    ) -> list[Tensor]:
        self._ranks.order("reduce")
        told = torch.zeros(0, dtype=torch.uint8) if told is None else told
        sums = self._agree(lambda: self._mine.reduce(reducer or self._shard, told, watch or self._watch))
        if sums is None:  # the leader was told
            return []
        digests = torch.zeros(self._ranks.size, dtype=torch.int64)
        digests[self._ranks.rank] = _digest(sums)
        self._sums = [*sums, self._ranks.sum(digests)]  # so that the vote is for all shards
        return self._sums

    def clear(self) -> None:
        self._ranks.order("clear")
        self._mine.clear()

    def apply(self, batch: BatchEntry, sums: Sequence[Tensor], told: Sequence[bytes]) -> None:
        self._ranks.order("apply", batch, [], list(told))
        self._mine.apply(batch, sums or self._sums, told)

    def entry(
        self, batch: BatchEntry, before: int, sums: Sequence[Tensor], told: Sequence[bytes]
    ) -> tuple[LedgerEntry, list[DeadEntry]]:
        return self._mine.entry(batch, before, sums, told)

    def give(self, reducer: Reducer | None, to: int, watch: Watch | None) -> None:
        self._ranks.order("give", None, to, None)
        self._agree(lambda: self._mine.give(reducer or self._shard, to, watch or self._watch))

    def get(self, reducer: Reducer | None, source: int, watch: Watch | None) -> None:
        self._ranks.order("get", None, source, None)
        self._agree(lambda: self._mine.get(reducer or self._shard, source, watch or self._watch))

    def close(self) -> None:
        self._shard.close()
        self._parts.close()

    def _agree(self, operation: Callable[[], T]) -> T | None:
        """Do it on every rank. Where it failed on any, the leader raises its error or PeerLost, and the others get None."""
        error, found = None, None
        try:
            found = operation()
        except LachesisError as raised:
            error = raised
        failed = bool(self._ranks.sum(torch.tensor([int(error is not None)])))
        if failed and self._leads:
            raise error or PeerLost("a rank of this replica lost its connection to the others'")
        return None if failed else found


def _watching(broker: BlockingBroker, me: Membership) -> Watch:
    """Raises Moved once the epoch is over; looks now and then only."""
    looked_at = 0.0

    def watch() -> None:
        nonlocal looked_at
        if time.monotonic() - looked_at < EPOCH_POLL_S:
            return
        looked_at = time.monotonic()
        epoch_state = broker.call(broker.broker.members.epoch_state, me.policy)
        if epoch_state is None or (epoch_state.generation, epoch_state.epoch) != (me.generation, me.epoch):
            raise Moved(f"epoch {me.epoch} of policy {me.policy!r} is over")

    return watch


def _digest(sums: Sequence[Tensor]) -> int:
    found = 0
    for tensor in sums:
        found = zlib.crc32(tensor.cpu().view(torch.uint8).numpy().data, found)
    return found

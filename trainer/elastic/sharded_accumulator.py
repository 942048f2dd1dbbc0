"""The GradientAccumulator (see accumulator.py) of a replica that is several ranks: each holds a shard, and sums it with its like.

Rank 0 leads, as in distributed.py: it alone runs the training loop, and here it has the others do what it does. A
rank's shard of gradients and weights goes to the same rank of the other replicas, over connections of its own; so all
replicas of a policy need as many ranks. What fails on one rank fails on all: they agree after each exchange.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import Enum, auto
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
from lachesis.trainer.engine.distributed import Ranks

T = TypeVar("T")


class ShardCommand(Enum):
    """What rank 0 has the others do, beside algo.rank_group.Command."""

    CONNECT = auto()
    DISCONNECT = auto()
    ACCUMULATE = auto()
    REDUCE = auto()
    CLEAR = auto()
    APPLY = auto()
    SEND_STATE = auto()
    RECEIVE_STATE = auto()


class ShardedAccumulator:
    """Rank 0's: the GradientAccumulator of the whole replica. What it does with its own shard, the others follow with theirs."""

    def __init__(self, mine: GroupAccumulator, ranks: Ranks, url: str, run: str) -> None:
        """`url`, `run`: by which the others reach Redis."""
        self._mine, self._ranks, self._url, self._run = mine, ranks, url, run

    @property
    def metrics(self) -> dict[str, float]:
        return self._mine.metrics

    @property
    def pristine(self) -> bool:
        return self._mine.pristine

    def connect(self, me: Membership, rank: int, world: int) -> None:
        self._ranks.order(ShardCommand.CONNECT, me, rank, world, self._url, self._run)
        self._agree(lambda: None)  # the caller's reducer is connected

    def disconnect(self) -> None:
        self._ranks.order(ShardCommand.DISCONNECT)

    def accumulate(self, batch: BatchEntry, claimed: Sequence[tuple[int, Group]]) -> list[bytes]:
        self._ranks.order(ShardCommand.ACCUMULATE, batch, list(claimed))
        return self._mine.accumulate(batch, claimed)

    def reduce(self, reducer: Reducer, told: Tensor, watch: Watch) -> list[Tensor]:
        self._ranks.order(ShardCommand.REDUCE)
        sums = self._agree(lambda: self._mine.reduce(reducer, told, watch))
        return [*sums, _digests(self._ranks, sums)]  # so that the vote is for all shards

    def clear(self) -> None:
        self._ranks.order(ShardCommand.CLEAR)
        self._mine.clear()

    def apply(self, batch: BatchEntry, sums: Sequence[Tensor], told: Sequence[bytes]) -> None:
        self._ranks.order(ShardCommand.APPLY, batch, list(told))
        self._mine.apply(batch, sums, told)

    def entry(
        self, batch: BatchEntry, before: int, sums: Sequence[Tensor], told: Sequence[bytes]
    ) -> tuple[LedgerEntry, list[DeadEntry]]:
        return self._mine.entry(batch, before, sums, told)

    def send_state(self, reducer: Reducer, to: int, watch: Watch) -> None:
        self._ranks.order(ShardCommand.SEND_STATE, to)
        self._agree(lambda: self._mine.send_state(reducer, to, watch))

    def receive_state(self, reducer: Reducer, source: int, watch: Watch) -> None:
        self._ranks.order(ShardCommand.RECEIVE_STATE, source)
        self._agree(lambda: self._mine.receive_state(reducer, source, watch))

    def _agree(self, operation: Callable[[], T]) -> T:
        """Do it while the others do their part. Raises its error, or PeerLost where it failed on another rank."""
        try:
            found = operation()
        except LachesisError:
            _failed_on_any(self._ranks, mine=True)
            raise
        if _failed_on_any(self._ranks, mine=False):
            raise PeerLost("a rank of this replica lost its connection to the others'")
        return found


class ShardFollower:
    """Another rank's part of each command. Its shard goes over a connection of its own; it stops waiting when the epoch is over."""

    def __init__(self, mine: GroupAccumulator, ranks: Ranks, backend: Backend) -> None:
        self._mine, self._ranks, self._backend = mine, ranks, backend
        self._reducer: Reducer = Alone()
        self._watch: Watch = lambda: None
        self._sums: list[Tensor] = []  # of the newest REDUCE that succeeded on all ranks
        self._parts = ExitStack()
        self._broker: BlockingBroker | None = None

    def follow(self, command: Enum, args: tuple[Any, ...]) -> None:
        """Do this rank's part of what rank 0 does, with the arguments that it gave."""
        match command:
            case ShardCommand.CONNECT:
                self._agree(lambda: self._connect(*args))
            case ShardCommand.DISCONNECT:
                self._reducer.close()
                self._reducer = Alone()
            case ShardCommand.ACCUMULATE:
                self._mine.accumulate(*args)
            case ShardCommand.REDUCE:
                self._reduce()
            case ShardCommand.CLEAR:
                self._mine.clear()
            case ShardCommand.APPLY:
                batch, told = args
                self._mine.apply(batch, self._sums, told)
            case ShardCommand.SEND_STATE:
                [to] = args
                self._agree(lambda: self._mine.send_state(self._reducer, to, self._watch))
            case ShardCommand.RECEIVE_STATE:
                [source] = args
                self._agree(lambda: self._mine.receive_state(self._reducer, source, self._watch))
            case _:
                raise AssertionError(command)

    def close(self) -> None:
        self._reducer.close()
        self._parts.close()

    def _connect(self, me: Membership, rank: int, world: int, url: str, run: str) -> None:
        if self._broker is None:
            self._broker = self._parts.enter_context(connect_blocking(url, run))
        self._watch = _watching(self._broker, me)
        self._reducer = connect(self._backend, self._broker, me, rank, world, self._watch, shard=self._ranks.rank)

    def _reduce(self) -> None:
        nothing = torch.zeros(0, dtype=torch.uint8)  # rank 0 tells of the groups
        sums = self._agree(lambda: self._mine.reduce(self._reducer, nothing, self._watch))
        if sums is not None:
            self._sums = [*sums, _digests(self._ranks, sums)]

    def _agree(self, operation: Callable[[], T]) -> T | None:
        """Do it; None where it failed on any rank. Rank 0 raises then."""
        try:
            found = operation()
        except LachesisError:
            _failed_on_any(self._ranks, mine=True)
            return None
        return None if _failed_on_any(self._ranks, mine=False) else found


def _failed_on_any(ranks: Ranks, *, mine: bool) -> bool:
    """Whether it failed on this rank (`mine`) or another; all ranks ask at once."""
    return bool(ranks.sum(torch.tensor([int(mine)])))


def _digests(ranks: Ranks, sums: Sequence[Tensor]) -> Tensor:
    """Of each rank's shard, the same on every rank."""
    digests = torch.zeros(ranks.size, dtype=torch.int64)
    digests[ranks.rank] = _digest(sums)
    return ranks.sum(digests)


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

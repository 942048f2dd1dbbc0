"""The groups that one replica trains of a step: claimed and fetched while it computes, as long as that delays nobody."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

from lachesis.broker import BlockingBroker
from lachesis.broker.records.groups import BatchEntry, Group, Membership
from lachesis.broker.replicas.members import Claimed
from lachesis.trainer.elastic.config import Team
from lachesis.trainer.elastic.pace import Pace


class Claims:
    """`with Claims(…) as claims: while groups := claims.next(): …`."""

    def __init__(
        self, broker: BlockingBroker, team: Team, me: Membership, batch: BatchEntry, held: Collection[int], pace: Pace
    ) -> None:
        """`held`: places of the batch's groups that this replica has computed already."""
        self._broker, self._team, self._me, self._step, self._pace = broker, team, me, batch.step, pace
        self._known = set(held)
        self._coming: Future[tuple[Claimed | None, list[Group]]] | None = None
        self._left = float(len(batch.gids) - len(held))  # groups that nobody has, as far as is known
        self._all_taken = False
        self._computing, self._since = 0, 0.0  # groups, and when that began
        self._computed, self._took_s = 0, 0.0

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._coming is not None:
            self._coming.cancel()
            with suppress(Exception):  # what it got, Redis knows, and it gets it again
                self._coming.result()

    def next(self) -> list[tuple[int, Group]]:
        """More groups, each with its place in the batch; none once living replicas have them all.

        Raises Moved; LeaseLost if another step is open; LookupError if groups are gone.
        """
        meanwhile = self._pace.meanwhile(self._done())
        if self._coming is None:
            if self._all_taken:
                return []
            self._left -= meanwhile
            self._coming, meanwhile = self._start(busy=0), 0.0
        claimed, groups = self._coming.result()
        self._coming = None
        if claimed is None:
            return []
        self._all_taken = not claimed.left
        self._left = claimed.left - meanwhile
        if self._pace.allows(self._left, len(groups)):
            self._coming = self._start(busy=len(groups))
        self._computing, self._since = len(groups), time.perf_counter()
        return list(zip([place for place, _ in claimed.groups], groups, strict=True))

    def _done(self) -> int:
        """Groups that were computed since the last call."""
        done, self._computing = self._computing, 0
        if done:
            self._computed += done
            self._took_s += time.perf_counter() - self._since
            self._pace.computed(self._computed, self._took_s)
        return done

    def _start(self, *, busy: int) -> Future[tuple[Claimed | None, list[Group]]]:
        return self._broker.start(self._claim, self._pace.count(self._left, busy, self._team.together_s))

    async def _claim(self, count: int) -> tuple[Claimed | None, list[Group]]:
        """New groups with their contents, or those that this replica lost the reply for."""
        broker = self._broker.broker
        while True:
            claimed = await broker.members.claim(self._me, self._step, count=count, held=len(self._known))
            if claimed is None:
                return None, []
            new = tuple((place, gid) for place, gid in claimed.groups if place not in self._known)
            if new:
                self._known.update(place for place, _ in new)
                return Claimed(new, claimed.left), await broker.queue.fetch([gid for _, gid in new])

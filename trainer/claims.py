"""The groups that one replica trains of a step: claimed and fetched while it computes, as long as that delays nobody."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

from lachesis.broker import BlockingBroker
from lachesis.broker.members import Claimed
from lachesis.broker.records import Group, Membership
from lachesis.trainer.duties import Team


class Pace:
    """How fast this replica and all of them are; kept from step to step."""

    def __init__(self) -> None:
        self.mine_s = float("inf")  # of a group
        self.per_s = 0.0  # groups of all replicas together

    def allows(self, left: int, mine: int) -> bool:
        """Whether to claim more groups while it computes `mine`, where nobody has `left` others yet.

        Only if those will not have run out when it comes to what it claims now: so even the slowest replica has no more
        than one claim to finish when there is nothing left, as if it had claimed none before it was ready.
        """
        return self.per_s > 0 and mine * self.mine_s * self.per_s < left


class Claims:
    """`with Claims(…) as claims: while groups := claims.next(): …`."""

    def __init__(
        self, broker: BlockingBroker, team: Team, me: Membership, step: int, held: Collection[int], pace: Pace
    ) -> None:
        """`held`: places of the step's groups that this replica has computed already."""
        self._broker, self._team, self._me, self._step, self._pace = broker, team, me, step, pace
        self._known = set(held)
        self._coming: Future[tuple[Claimed | None, list[Group]]] | None = None
        self._left: int | None = None  # that nobody has, as of the newest claim
        self._total, self._began = 0, 0.0  # left at the first claim, and when that was
        self._computing, self._since = 0, 0.0  # groups that it computes, and since when

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._coming is not None:
            self._coming.cancel()
            with suppress(BaseException):  # what it got, Redis knows, and it gets it again
                self._coming.result()

    def next(self) -> list[tuple[int, Group]]:
        """More groups, each with its place in the batch; none once living replicas have them all.

        Raises Moved; LeaseLost if another step is open; LookupError if groups are gone.
        """
        if self._computing:
            self._pace.mine_s = (time.perf_counter() - self._since) / self._computing
        if self._left == 0 and self._coming is None:
            return self._end()
        claimed, groups = self._coming.result() if self._coming else self._broker.call(self._claim)
        self._coming = None
        if claimed is None:
            return self._end()
        if self._left is None:
            self._total, self._began = claimed.left + len(groups), time.perf_counter()
        self._left = claimed.left
        if self._pace.allows(self._left, len(groups)):
            self._coming = self._broker.start(self._claim)
        self._computing, self._since = len(groups), time.perf_counter()
        return list(zip([place for place, _ in claimed.groups], groups, strict=True))

    def _end(self) -> list[tuple[int, Group]]:
        if self._total:
            self._pace.per_s = self._total / (time.perf_counter() - self._began)
        return []

    async def _claim(self) -> tuple[Claimed | None, list[Group]]:
        """New groups with their contents, or those that this replica lost the reply for."""
        broker = self._broker.broker
        while True:
            claimed = await broker.members.claim(self._me, self._step, count=self._team.chunk, held=len(self._known))
            if claimed is None:
                return None, []
            new = tuple((place, gid) for place, gid in claimed.groups if place not in self._known)
            if new:
                self._known.update(place for place, _ in new)
                return Claimed(new, claimed.left), await broker.queue.fetch([gid for _, gid in new])

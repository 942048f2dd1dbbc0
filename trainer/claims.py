"""The groups that one replica trains of a step: claimed and fetched while it computes, as long as that delays nobody."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

from lachesis.broker import BlockingBroker
from lachesis.broker.members import Claimed
from lachesis.broker.records import Group, Membership
from lachesis.trainer.duties import Team


class Pace:
    """How fast this replica is beside the others; kept from step to step."""

    def __init__(self) -> None:
        self.others = float("inf")  # groups that they claim while this one computes one

    def allows(self, left: int, mine: int) -> bool:
        """Whether to claim more groups while it computes `mine`, where nobody has `left` others yet.

        Only if those will not have run out when it comes to what it claims now: so even the slowest replica has no more
        than one claim to finish when there is nothing left, as if it had claimed none before it was ready.
        """
        return mine * self.others < left


class Claims:
    """`with Claims(…) as claims: while groups := claims.next(): …`."""

    def __init__(
        self, broker: BlockingBroker, team: Team, me: Membership, step: int, held: Collection[int], pace: Pace
    ) -> None:
        """`held`: places of the step's groups that this replica has computed already."""
        self._broker, self._team, self._me, self._step, self._pace = broker, team, me, step, pace
        self._known = set(held)
        self._coming: Future[tuple[Claimed | None, list[Group]]] | None = None
        self._computed, self._computing = 0, 0  # groups
        self._newest: tuple[int, int] | None = None  # claim: groups that it had computed then, and groups left

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
        self._computed += self._computing
        self._computing = 0
        if self._coming is None:
            if self._newest is not None and self._newest[1] == 0:
                return []
            self._coming = self._start()
        claimed, groups = self._coming.result()
        self._coming = None
        if claimed is None:
            return []
        if self._pace.allows(claimed.left, len(groups)):
            self._coming = self._start()
        self._computing = len(groups)
        return list(zip([place for place, _ in claimed.groups], groups, strict=True))

    def _start(self) -> Future[tuple[Claimed | None, list[Group]]]:
        return self._broker.start(self._claim, self._computed)

    def _measure(self, computed: int, claimed: int, left: int) -> None:
        """What others claimed since the newest claim; no number is high enough if all ran out during the first group."""
        if self._newest is not None and computed > self._newest[0]:
            before, were_left = self._newest
            others = max(0, were_left - left - claimed) / (computed - before)
            if left == 0:
                others = max(others, self._pace.others) if before else float("inf")
            self._pace.others = others
        self._newest = computed, left

    async def _claim(self, computed: int) -> tuple[Claimed | None, list[Group]]:
        """New groups with their contents, or those that this replica lost the reply for."""
        broker, count = self._broker.broker, self._team.chunk
        while True:
            claimed = await broker.members.claim(self._me, self._step, count=count, held=len(self._known))
            self._measure(computed, len(claimed.groups) if claimed else 0, claimed.left if claimed else 0)
            if claimed is None:
                return None, []
            new = tuple((place, gid) for place, gid in claimed.groups if place not in self._known)
            if new:
                self._known.update(place for place, _ in new)
                return Claimed(new, claimed.left), await broker.queue.fetch([gid for _, gid in new])

"""The groups that one replica trains of a step: claimed and fetched while it computes, as long as that delays nobody."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from math import inf
from types import TracebackType

from lachesis.broker import BlockingBroker
from lachesis.broker.records.groups import Group
from lachesis.broker.records.steps import BatchEntry, Membership
from lachesis.broker.replicas.members import Claimed
from lachesis.trainer.elastic.config import ElasticConfig


class Claims:
    """`with Claims(…) as claims: while groups := claims.next(): …`."""

    def __init__(
        self,
        broker: BlockingBroker,
        config: ElasticConfig,
        me: Membership,
        batch: BatchEntry,
        held: Collection[int],
        claim_policy: ClaimPolicy,
    ) -> None:
        """`held`: places of the batch's groups that this replica has computed already."""
        self._broker, self._config, self._me, self._step, self._claim_policy = (
            broker,
            config,
            me,
            batch.step,
            claim_policy,
        )
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
        meanwhile = self._claim_policy.meanwhile(self._done())
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
        if self._claim_policy.allows(self._left, len(groups)):
            self._coming = self._start(busy=len(groups))
        self._computing, self._since = len(groups), time.perf_counter()
        return list(zip([place for place, _ in claimed.groups], groups, strict=True))

    def _done(self) -> int:
        """Groups that were computed since the last call."""
        done, self._computing = self._computing, 0
        if done:
            self._computed += done
            self._took_s += time.perf_counter() - self._since
            self._claim_policy.computed(self._computed, self._took_s)
        return done

    def _start(self, *, busy: int) -> Future[tuple[Claimed | None, list[Group]]]:
        return self._broker.start(self._claim, self._claim_policy.count(self._left, busy, self._config.together_s))

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


MICRO = 1e-6


class ClaimPolicy:
    """Of one replica; kept from step to step."""

    def __init__(self) -> None:
        self.speed = 0.0  # groups a second, 0: not known
        self.others = inf  # groups that they compute while this one computes one; inf as long as that is not known
        self._replicas = 1

    def met(self, replicas: int) -> None:
        """So many are connected, this one included. Who came is not known yet, nor what is left of a step in work."""
        self._replicas, self.others = replicas, inf if replicas > 1 else 0.0

    def computed(self, groups: int, seconds: float) -> None:
        """What this replica has computed of a step so far."""
        self.speed = groups / max(seconds, MICRO)

    @property
    def word(self) -> tuple[int, int]:
        """For the others, who `hear` the sum of all: groups in a million seconds; and 1, or 0 if not known."""
        return int(self.speed / MICRO), int(self.speed > 0)

    def hear(self, speeds: int, known: int) -> None:
        """Those whose speed is not known are taken to be like the rest."""
        if self.speed and known:
            self.others = max(0.0, speeds * MICRO * self._replicas / known / self.speed - 1)

    def count(self, left: float, busy: int, together_s: float) -> int:
        """How many groups to claim at once; several only if they are computed in less than `together_s`."""
        if self.others == inf:
            return 1
        share = (left - self.meanwhile(busy)) / (1 + self.others)  # all are ready at once if each takes its own
        fitting = share + min(0.5, self.others / (1 + self.others))
        return max(1, int(min(fitting, together_s * self.speed)))

    def allows(self, left: float, mine: int) -> bool:
        """Whether to claim more while it computes `mine`: so even the slowest has no more than one to finish at the end."""
        return left - self.meanwhile(mine) >= 1

    def meanwhile(self, mine: int) -> float:
        """Groups that others compute while this one computes `mine`."""
        return mine * self.others if mine else 0.0

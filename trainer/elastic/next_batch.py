"""What the first of several replicas does for each step's beginning: have a batch formed and lent, and its groups laid out."""

from __future__ import annotations

from concurrent.futures import Future

from lachesis.broker import BlockingBroker
from lachesis.broker.failpoints import crash_point
from lachesis.broker.records.steps import BatchEntry, Lease, Membership
from lachesis.broker.replicas.members import CONSUMER
from lachesis.trainer.elastic.config import Team
from lachesis.trainer.prefetch import noticing_resets


class Layout:
    """Of one replica; only the first one uses it."""

    def __init__(self, broker: BlockingBroker, team: Team) -> None:
        self._broker, self._queue, self._team = broker, broker.broker.queue, team
        self._forming: Future[None] | None = None

    def prepare(self, step: int) -> None:
        """While `step` is in work, form the batch after it, if there are rollouts for it."""
        if self._team.prefetch and not self._team.shadow and step < self._team.num_steps:
            self._forming = self._broker.start(self._form_after, step)

    def lay_out(self, me: Membership) -> BatchEntry | None:
        """The next batch, with its groups laid out for all, if there is one or can be formed. Raises Moved; Conflict after a reset."""
        if self._forming is not None:
            self._forming.result()
            self._forming = None
        while (lease := self._lend()) is None or not self._fits(lease.batch):
            if lease is not None:
                self._broker.call(self._take_apart, lease.batch.step)
            elif (
                self._team.shadow
                or self._broker.call(self._queue.form, self._team.batch_size, self._team.policy) is None
            ):
                return None
        crash_point("leased", lease.batch.step)
        return lease.batch if self._broker.call(self._broker.broker.members.open, me, lease.batch.step) else None

    async def _form_after(self, step: int) -> None:
        with noticing_resets(self._broker.broker.keys.run, self._team.policy):
            if await self._queue.upcoming(self._team.policy, step) is None:
                await self._queue.form(self._team.batch_size, self._team.policy)

    def _fits(self, batch: BatchEntry) -> bool:
        """Whether the batch can be trained: it is of the right size, and its groups are there."""
        fits = self._team.shadow or batch.n == self._team.batch_size
        return fits and not self._broker.call(self._queue.lacks, batch.gids)

    async def _take_apart(self, step: int) -> None:
        await self._queue.refit(self._team.policy, apart=[step])

    def _lend(self) -> Lease | None:
        """It counts as delivered when the leader's duties say so."""
        limit = self._team.max_deliveries
        with noticing_resets(self._broker.broker.keys.run, self._team.policy):
            return self._broker.call(
                self._queue.lease, self._team.policy, CONSUMER, lapse_s=0, max_deliveries=limit, delivered=False
            )

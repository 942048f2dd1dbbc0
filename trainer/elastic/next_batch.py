"""What the first of several replicas does for each step's beginning: have a batch formed and lent, and its groups laid out."""

from __future__ import annotations

from concurrent.futures import Future

from lachesis.broker import BlockingBroker
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.steps import BatchEntry, Lease, Membership
from lachesis.broker.replicas.members import CONSUMER
from lachesis.trainer.elastic.config import ElasticConfig
from lachesis.trainer.prefetch import noticing_resets


class BatchOpener:
    """Of one replica; only the first one uses it."""

    def __init__(self, broker: BlockingBroker, config: ElasticConfig) -> None:
        self._broker, self._queue, self._config = broker, broker.broker.queue, config
        self._forming: Future[None] | None = None

    def prepare(self, step: int) -> None:
        """While `step` is in work, form the batch after it, if there are rollouts for it."""
        if self._config.prefetch and not self._config.shadow and step < self._config.num_steps:
            self._forming = self._broker.start(self._form_after, step)

    def open_next(self, me: Membership) -> BatchEntry | None:
        """The next batch, with its groups laid out for all, if there is one or can be formed. Raises Moved; Conflict after a reset."""
        if self._forming is not None:
            self._forming.result()
            self._forming = None
        while (lease := self._lend()) is None or not self._fits(lease.batch):
            if lease is not None:
                self._broker.call(self._take_apart, lease.batch.step)
            elif (
                self._config.shadow
                or self._broker.call(self._queue.form, self._config.batch_size, self._config.policy) is None
            ):
                return None
        failpoint("leased", lease.batch.step)
        return lease.batch if self._broker.call(self._broker.broker.members.open_step, me, lease.batch.step) else None

    async def _form_after(self, step: int) -> None:
        with noticing_resets(self._broker.broker.keys.run, self._config.policy):
            if await self._queue.upcoming(self._config.policy, step) is None:
                await self._queue.form(self._config.batch_size, self._config.policy)

    def _fits(self, batch: BatchEntry) -> bool:
        """Whether the batch can be trained: it is of the right size, and its groups are there."""
        fits = self._config.shadow or batch.n == self._config.batch_size
        return fits and not self._broker.call(self._queue.lacks, batch.gids)

    async def _take_apart(self, step: int) -> None:
        await self._queue.refit(self._config.policy, apart=[step])

    def _lend(self) -> Lease | None:
        """It counts as delivered when the leader's duties say so."""
        limit = self._config.max_deliveries
        with noticing_resets(self._broker.broker.keys.run, self._config.policy):
            return self._broker.call(
                self._queue.lease, self._config.policy, CONSUMER, lapse_s=0, max_deliveries=limit, delivered=False
            )

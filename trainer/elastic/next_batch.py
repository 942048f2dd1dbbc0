"""How several replicas come by each step's batch: the first has one formed and lent, and its groups laid out, and all wait for that."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import NoReturn

from lachesis.broker import BlockingBroker
from lachesis.broker.errors import Moved
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.steps import BatchEntry, Lease, Membership
from lachesis.broker.replicas.members import CONSUMER
from lachesis.trainer.elastic.collectives.base import Watch
from lachesis.trainer.elastic.config import ElasticConfig
from lachesis.trainer.elastic.membership import pause
from lachesis.trainer.prefetch import noticing_resets

FORM_S = 0.25  # the leader waits so long for rollouts before it looks around


class BatchOpener:
    """Of one replica; only the first one opens steps."""

    def __init__(self, broker: BlockingBroker, config: ElasticConfig) -> None:
        self._broker, self._queue, self._config = broker, broker.broker.queue, config
        self._forming: Future[None] | None = None

    def prepare(self, step: int) -> None:
        """While `step` is in work, form the batch after it, if there are rollouts for it."""
        if self._config.prefetch and not self._config.shadow and step < self._config.num_steps:
            self._forming = self._broker.start(self._form_after, step)

    def wait(self, me: Membership, *, leads: bool, watch: Watch) -> BatchEntry:
        """The batch in work, once there is one. The first replica, which `leads`, gets it lent for all. Raises Moved, and what `watch` does."""
        members, since = self._broker.broker.members, time.monotonic()
        while True:
            watch()
            epoch_state, batch = self._broker.call(members.epoch_state, self._config.policy), None
            if epoch_state is not None and epoch_state.open:
                batch = self._broker.call(self._queue.batch, epoch_state.open)
                if batch is None:
                    close_step(self._broker, me, epoch_state.open, "its batch was taken apart")
            elif leads:
                newest = self._broker.call(self._queue.newest_group)
                batch = self.open_next(me)
                if batch is None:
                    self._broker.call(self._queue.wait_for_group, FORM_S, after=newest)
            else:
                pause(since)
            if batch is not None:
                return batch

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


def close_step(broker: BlockingBroker, me: Membership, step: int, why: str) -> NoReturn:
    """The step can't be trained as it is. The first replica sees to that when all have met (see BatchOpener.open_next). Raises Moved."""
    broker.call(broker.broker.members.close_step, me, step, why=why)
    raise Moved(f"step {step} of policy {me.policy!r} was closed: {why}")

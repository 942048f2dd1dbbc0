"""One run's groups and batches: PUT into the queue, FORM into a batch, LEASE, COMMIT, RETIRE, a file each."""

from __future__ import annotations

from redis.exceptions import ResponseError

from lachesis.broker.queue import selection
from lachesis.broker.queue.blobs import Blobs
from lachesis.broker.queue.commit import Commit, Steps
from lachesis.broker.queue.counters import makes_batch, read_status
from lachesis.broker.queue.form import BatchFormer, Staleness
from lachesis.broker.queue.lease import Lender
from lachesis.broker.queue.put import Put
from lachesis.broker.queue.refit import Refit
from lachesis.broker.records.entries import read_entries, read_json
from lachesis.broker.records.groups import GroupEntry
from lachesis.broker.records.registrations import EnvRecord, TrainerConfig
from lachesis.broker.records.steps import QueueStatus
from lachesis.broker.retention.dead_letters import KeepRefused
from lachesis.broker.retention.shadows import Shadows
from lachesis.broker.retention.trained_batches import Retention
from lachesis.broker.run_view import RunView
from lachesis.broker.store.connection import wait_for_entries
from lachesis.broker.store.redis_errors import trouble


class Queue:
    """Groups and batches of one run. A policy reads batches as the consumer group of its name."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self.staleness = Staleness(view)
        self.shadows = Shadows(view)
        self.retention = Retention(view, self.shadows)
        self.refit = Refit(view)
        former = BatchFormer(view, self.staleness, self.refit)
        lender = Lender(view, former, self.refit, self.shadows)
        steps = Steps(view)

        self.blobs = Blobs(view)
        self.fetch, self.lacks = self.blobs.fetch, self.blobs.lacks
        self.put = Put(view, self.blobs)
        self.keep_refused = KeepRefused(view)
        self.form = former.form
        self.subscribe, self.readers = lender.subscribe, lender.readers
        self.lease, self.lease_or_form, self.renew = lender.lease, lender.lease_or_form, lender.renew
        self.upcoming, self.deliver, self.settled = lender.upcoming, lender.deliver, lender.settled
        self.commit = Commit(view)
        self.batch, self.batches = steps.batch, steps.batches
        self.ledger, self.newest_committed = steps.ledger, steps.newest_committed

    # -- what waits -----------------------------------------------------------------------------------------------

    async def starves(self) -> bool:
        """Whether the registered trainer would get no batch now: then no limit holds a group back, it may be the missing one.

        No where none has registered, and nobody knows what a batch is. From the counters.
        """
        config = read_json(TrainerConfig, await self._view.redis.hget(self._view.keys.trainers, "config"))
        return config is not None and not makes_batch(await self.status(), config.batch_size)

    async def queued(self, count: int | None = None) -> list[tuple[str, GroupEntry]]:
        """(entry id, entry) of queued groups, oldest first."""
        found = await self._view.redis.xrange(self._view.keys.groups, count=count)
        return [(id_.decode(), entry) for id_, entry in read_entries(GroupEntry, found)]

    async def newest_group(self) -> str:
        """Where the queue's stream ends now; what `wait_for_group` counts from."""
        try:
            return bytes((await self._view.redis.xinfo_stream(self._view.keys.groups))["last-generated-id"]).decode()
        except ResponseError as error:  # no group was ever accepted
            if trouble(error):
                raise
            return "0-0"

    async def wait_for_group(self, timeout_s: float, *, after: str = "") -> None:
        """Return when a group newer than `after` (empty: than this call) has been accepted, or after `timeout_s`."""
        await wait_for_entries(
            self._view.blocking, self._view.keys.groups, after or await self.newest_group(), timeout_s
        )

    async def retire(self, policy: str, covered: int) -> int:
        """`policy` no longer needs batches up to step `covered`. Frees what nobody needs; returns how many that were."""
        await self.retention.advance_checkpoint(policy, covered)
        return await self.retention.free()

    async def status(self) -> QueueStatus:
        """Counters only: constant time, whatever the queue holds. Formed but undelivered batches count as queued."""
        return read_status(await self._view.redis.hgetall(self._view.keys.state))

    async def odd_sequences(self, env: EnvRecord) -> int:
        """Queued sequences of an environment in groups of other sizes than its own, less those that make up its size."""
        counts = dict((await self.status()).waiting.get(str(env.env_id), {}))
        counts.pop(env.config.group_size, None)
        return selection.left_over(counts, env.config.group_size)

"""LEASE: read formed batches as a policy, and borrow them one by one."""

from __future__ import annotations

from redis.exceptions import ResponseError

from lachesis.broker.errors import ConfigurationError, Unreadable
from lachesis.broker.queue.form import BatchFormer
from lachesis.broker.queue.refit import Refit
from lachesis.broker.records.entries import from_entry, read_entries, warn, warn_once
from lachesis.broker.records.keys import ARCHIVE
from lachesis.broker.records.steps import MAX_DELIVERIES, BatchEntry, Lease
from lachesis.broker.retention.shadows import Rule, Shadows
from lachesis.broker.run_view import RunView
from lachesis.broker.store.redis_errors import trouble


class Lender:
    """Lends the batches of one run. A policy reads them as the consumer group of its name."""

    def __init__(self, view: RunView, former: BatchFormer, refit: Refit, shadows: Shadows) -> None:
        self._view, self._former, self._refit, self._shadows = view, former, refit, shadows

    async def subscribe(self, policy: str, shadow: Rule | None = None) -> None:
        """Make `policy` a reader of all batches that are still there, by `shadow` or as no shadow. Harmless to repeat."""
        if policy == ARCHIVE:
            raise ConfigurationError(f"policy = {policy!r}: that name is the archiver's; choose another")
        await add_reader(self._view, policy, shadow)

    async def lease(
        self,
        policy: str,
        consumer: str,
        *,
        lapse_s: float,
        max_deliveries: int = MAX_DELIVERIES,
        delivered: bool = True,
    ) -> Lease | None:
        """Borrow a formed batch: one's own unfinished one, one whose lease lapsed, or the next. None if there is none.

        A batch that was lent `max_deliveries` times (0: any number) and never committed is given up instead. From now
        on it counts as delivered, so that environments make more; unless `delivered` is false: then from `deliver` on.
        """
        keys = self._view.keys
        while True:
            gone, *lent = await self._view.scripts.lease(
                keys=[keys.batches, keys.state, keys.dead, keys.skipped, keys.settings],
                args=[policy, consumer, int(lapse_s * 1000), max_deliveries, int(delivered)],
            )
            if gone:
                warn("batches were deleted before they were trained", run=keys.run, policy=policy, batches=gone)
            if not lent:
                return None
            id_, flat, deliveries = lent
            step = int(id_.partition(b"-")[0])
            try:
                batch = from_entry(BatchEntry, dict(zip(flat[::2], flat[1::2], strict=True)), step=step)
                if not batch.gids:
                    raise Unreadable(f"step {step} has no groups")
            except Unreadable as error:
                warn_once(str(error))
                await self._refit(policy, apart=[step])  # which leaves one batch less
                continue
            return Lease(batch=batch, consumer=consumer, deliveries=int(deliveries))

    async def upcoming(self, policy: str, after: int) -> BatchEntry | None:
        """What `lease` lends to a reader that has step `after` in work once that is committed, if it is formed already.

        A look that changes nothing: the batch goes on counting as queued. Raises Redis's NOGROUP if `policy` does not
        read (any more).
        """
        batches = self._view.keys.batches
        pending = await self._view.redis.xpending_range(batches, policy, f"({after}-0", "+", 1)
        if pending:
            start = pending[0]["message_id"].decode()
        else:
            readers = await self._view.redis.xinfo_groups(batches)
            delivered = {reader["name"]: reader["last-delivered-id"].decode() for reader in readers}
            start = f"({delivered.get(policy.encode(), '0-0')}"
            rule = (await self._shadows.rules()).get(policy)
            if rule is not None and rule.kind == "lossy":
                skipped = int(await self._view.redis.hget(self._view.keys.state, "formed") or 0) - rule.max_behind
                start = f"({max(skipped, int(start[1:].partition('-')[0]))}-0"
        while found := await self._view.redis.xrange(batches, start, count=1):
            if readable := read_entries(BatchEntry, found):
                return readable[0][1]
            start = f"({found[0][0].decode()}"
        return None

    async def lease_or_form(
        self, policy: str, consumer: str, batch_size: int, *, lapse_s: float, max_deliveries: int = MAX_DELIVERIES
    ) -> Lease | None:
        """Like `lease`, forming a batch when none is waiting. One of another size is taken apart, and never lent."""
        while True:
            lease = await self.lease(policy, consumer, lapse_s=lapse_s, max_deliveries=max_deliveries)
            if lease is None and await self._former.form(batch_size, policy) is not None:
                lease = await self.lease(policy, consumer, lapse_s=lapse_s, max_deliveries=max_deliveries)
            if lease is None or lease.batch.n == batch_size:
                return lease
            await self._refit(policy, apart=[lease.batch.step])

    async def deliver(self, step: int) -> bool:
        """Batches up to `step` count as delivered from now on. False if they did already."""
        return bool(
            await self._view.scripts.mark_delivered(keys=[self._view.keys.batches, self._view.keys.state], args=[step])
        )

    async def renew(self, policy: str, lease: Lease) -> bool:
        """Keep a lease alive: resets its idle time without counting as a delivery. False if it is not ours any more."""
        reply = await self._view.scripts.renew(
            keys=[self._view.keys.batches],
            args=[policy, lease.consumer, lease.batch.step],
            client=self._view.heartbeats,
        )
        return bool(reply == b"renewed")

    async def settled(self, policy: str) -> int:
        """The newest step such that it and every earlier one is committed or given up by `policy`; 0 if there is none.

        Not a transaction, which a full Redis refuses: what was delivered first is read first.
        """
        readers = await self._view.redis.xinfo_groups(self._view.keys.batches)
        delivered = {reader["name"]: reader["last-delivered-id"] for reader in readers}.get(policy.encode(), b"0-0")
        pending = await self._view.redis.xpending(self._view.keys.batches, policy)
        if pending["pending"]:
            return int(pending["min"].split(b"-")[0]) - 1
        return int(delivered.split(b"-")[0])

    async def readers(self) -> list[str]:
        """Policies that read batches; the archiver is none."""
        try:
            names = [reader["name"].decode() for reader in await self._view.redis.xinfo_groups(self._view.keys.batches)]
        except ResponseError as error:  # nobody ever subscribed
            if trouble(error):
                raise
            return []
        return sorted(name for name in names if name != ARCHIVE)


async def add_reader(view: RunView, name: str, shadow: Rule | None = None) -> bool:
    """subscribe.lua: whether the reader is new. The archiver is one, too, under a name that no policy may have."""
    keys = [view.keys.batches, view.keys.state, view.keys.settings]
    return bool(await view.scripts.subscribe(keys=keys, args=[name, str(shadow or "")]))

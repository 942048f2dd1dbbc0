"""COMMIT: a batch has been trained; and the ledger that says so."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Literal, cast

from msgspec import structs

from lachesis.broker.errors import LeaseLost
from lachesis.broker.records.entries import flat_entry, read_entries
from lachesis.broker.records.groups import DeadEntry
from lachesis.broker.records.steps import BatchEntry, Lease, LedgerEntry
from lachesis.broker.retention.dead_letters import REFUSED_KEPT
from lachesis.broker.run_view import RunView

Reply = Literal["committed", "already", "fenced", "stolen", "gone"]
WHY_LOST = {
    "fenced": "another process writes this policy now",
    "stolen": "its lease lapsed and another consumer took it",
    "gone": "nobody holds it",
}


class Commit:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def __call__(
        self,
        policy: str,
        lease: Lease,
        entry: LedgerEntry,
        *,
        token: str = "",
        untrainable: Sequence[DeadEntry] = (),
    ) -> None:
        """Acknowledge a trained batch and write it to the ledger; repeating it changes nothing.

        `untrainable` are sequences that the step was trained without (see dead.untrainable). They are noted for triage,
        once; their groups count as trained.
        Raises LeaseLost if the batch belongs to someone else by now: the update must then be thrown away.
        """
        step = lease.batch.step
        entry = structs.replace(entry, at=entry.at or time.time())
        reply = await _commit(self._view, policy, lease, entry, token=token, untrainable=untrainable)
        if reply != "committed" and reply != "already":
            raise LeaseLost(f"step {step} of policy {policy!r} can't be committed: {WHY_LOST[reply]}")


async def _commit(
    view: RunView, policy: str, lease: Lease, entry: LedgerEntry, *, token: str, untrainable: Sequence[DeadEntry]
) -> Reply:
    """commit.lua."""
    keys = view.keys
    reply = await view.scripts.commit(
        keys=[keys.batches, keys.ledger(policy), keys.state, keys.writer(policy), keys.refused, keys.trained],
        args=[
            *(policy, lease.consumer, lease.batch.step, token, REFUSED_KEPT, len(untrainable)),
            *(text for record in (*untrainable, entry) for text in flat_entry(record)),
        ],
    )
    return cast("Reply", reply.decode())


class Steps:
    """The formed batches that are kept, and the steps that were trained."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    async def batch(self, step: int) -> BatchEntry | None:
        """A formed batch that is still kept."""
        found = await self._view.redis.xrange(self._view.keys.batches, f"{step}-0", f"{step}-0")
        return next((entry for _, entry in read_entries(BatchEntry, found)), None)

    async def batches(self) -> list[BatchEntry]:
        return [entry for _, entry in read_entries(BatchEntry, await self._view.redis.xrange(self._view.keys.batches))]

    async def ledger(self, policy: str) -> AsyncIterator[LedgerEntry]:
        """All trained steps, oldest first, read in slices."""
        start = "-"
        while found := await self._view.redis.xrange(self._view.keys.ledger(policy), start, "+", count=1000):
            for id_, fields in found:
                if entry := await self._trained(id_, fields):
                    yield entry
            start = f"({found[-1][0].decode()}"

    async def _trained(self, id_: bytes, fields: Mapping[bytes, bytes]) -> LedgerEntry | None:
        """A step of a ledger. Where its entry does not tell the groups, the batch may: until a checkpoint covers it, it is kept."""
        if readable := read_ledger([(id_, fields)]):
            return readable[0]
        batch = await self.batch(int(id_.partition(b"-")[0]))
        return None if batch is None else LedgerEntry(batch.step, batch.gids, batch.n, batch.tok, v_min=batch.v_min)

    async def newest_committed(self, policy: str) -> LedgerEntry | None:
        end = "+"
        while found := await self._view.redis.xrevrange(self._view.keys.ledger(policy), end, count=1):
            if readable := read_ledger(found):
                return readable[0]
            end = f"({found[0][0].decode()}"
        return None


def read_ledger(found: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[LedgerEntry]:
    """Entries of a ledger. The step is in their ids, too; only of one that was finished late it is another."""
    whole = [(id_, {b"step": id_.partition(b"-")[0], **fields}) for id_, fields in found]
    return [entry for _, entry in read_entries(LedgerEntry, whole)]

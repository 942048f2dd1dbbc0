"""A run at one instant, as an audit of one policy needs it."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from lachesis.broker.audit.places import Places, find_places
from lachesis.broker.client import Broker
from lachesis.broker.queue.commit import read_ledger
from lachesis.broker.records.entries import read_entries
from lachesis.broker.records.groups import DeadEntry, GroupEntry
from lachesis.broker.records.steps import BatchEntry, LedgerEntry

SLICE = 1000  # ledger entries read at a time


class Snapshot(Struct, frozen=True):
    """The parts of a run between which groups move."""

    ledger: list[LedgerEntry]
    committed: dict[int, LedgerEntry]  # the same by step
    batches: list[BatchEntry]  # that are kept
    open: list[BatchEntry]  # of these, what the policy neither trained nor gave up
    queued: list[GroupEntry]
    dead: list[str]  # ids of groups that are dead letters
    given_up: dict[int, list[str]]  # step that the policy gave up -> its groups; none where they became dead letters
    state: Mapping[bytes, bytes]  # the counters
    joined: int  # the step formed last when the policy joined
    unseen: int  # groups that had come and gone by then
    places: Places

    @classmethod
    async def read(cls, broker: Broker, policy: str) -> Snapshot:
        """Read the ledger, whose entries never change; then its tail and all that moves, in one transaction."""
        keys = broker.keys
        ledger, cursor = await _read_settled(broker, policy)
        async with broker.redis.pipeline(transaction=True) as pipe:
            pipe.xrange(keys.groups)
            pipe.xrange(keys.batches)
            pipe.xrange(keys.ledger(policy), cursor)
            pipe.xrange(keys.dead)
            pipe.hgetall(keys.skipped)
            pipe.hgetall(keys.state)
            raw_groups, raw_batches, raw_tail, raw_dead, raw_skipped, state = await pipe.execute()
        ledger += read_ledger(raw_tail)
        committed = {entry.step: entry for entry in ledger}
        given_up = _steps_of(policy, raw_skipped)
        batches = [entry for _, entry in read_entries(BatchEntry, raw_batches)]
        open_ = [batch for batch in batches if batch.step not in committed and batch.step not in given_up]
        queued = [entry for _, entry in read_entries(GroupEntry, raw_groups)]
        dead = [entry.gid for _, entry in read_entries(DeadEntry, raw_dead)]
        places = find_places(
            committed,
            {batch.step for batch in batches},
            waiting=_waiting(open_, queued, dead),
            given_up=[gid for gids in given_up.values() for gid in gids],
        )
        return cls(
            ledger=ledger,
            committed=committed,
            batches=batches,
            open=open_,
            queued=queued,
            dead=dead,
            given_up=given_up,
            state=state,
            joined=int(state.get(f"joined:{policy}".encode(), 0)),
            unseen=int(state.get(f"unseen:{policy}".encode(), 0)),
            places=places,
        )

    @property
    def waiting(self) -> list[str]:
        """Ids of the groups that are still to be trained, or to be put back."""
        return _waiting(self.open, self.queued, self.dead)

    @property
    def accounted(self) -> int:
        """Accepted groups whose whereabouts are known."""
        return self.places.total + self.count("purged") + self.unseen

    def count(self, name: str) -> int:
        """A counter of the state; 0 where there is none."""
        return int(self.state.get(name.encode(), 0))


async def _read_settled(broker: Broker, policy: str) -> tuple[list[LedgerEntry], str]:
    """The ledger, in slices, and what its tail begins after."""
    ledger: list[LedgerEntry] = []
    cursor = "-"
    while found := await broker.redis.xrange(broker.keys.ledger(policy), cursor, count=SLICE):
        ledger += read_ledger(found)
        cursor = f"({found[-1][0].decode()}"
    return ledger, cursor


def _waiting(batches: list[BatchEntry], queued: list[GroupEntry], dead: list[str]) -> list[str]:
    return [gid for batch in batches for gid in batch.gids] + [entry.gid for entry in queued] + dead


def _steps_of(policy: str, skipped: Mapping[bytes, bytes]) -> dict[int, list[str]]:
    prefix = f"{policy}:".encode()
    return {
        int(field.removeprefix(prefix)): gids.decode().split()
        for field, gids in skipped.items()
        if field.startswith(prefix)
    }

"""Is every accepted group in exactly one committed step, or still on its way to one? Read from Redis alone."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct, field

from lachesis.broker.client import Broker
from lachesis.broker.codec import from_entry
from lachesis.broker.records import BatchEntry, GroupEntry, LedgerEntry

SHOWN = 5  # examples named in a finding


class AuditReport(Struct):
    """Counts of accepted groups by where they are, and what contradicts the guarantees; no findings: clean."""

    policy: str
    accepted: int
    trained: int  # groups in committed steps
    open: int  # groups in formed, uncommitted batches
    queued: int
    steps: int
    newest_version: int
    findings: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.findings


async def audit(broker: Broker, policy: str = "main") -> AuditReport:
    """Check one policy's ledger against what was accepted. Safe on a live run: the moving parts are read at one instant."""
    redis, keys = broker.redis, broker.keys
    # ledger entries never change, so only the tail needs to be read at the same instant as the moving parts
    ledger, cursor = [], "-"
    while found := await redis.xrange(keys.ledger(policy), cursor, count=1000):
        ledger += [from_entry(LedgerEntry, fields) for _, fields in found]
        cursor = f"({found[-1][0].decode()}"
    async with redis.pipeline(transaction=True) as pipe:
        pipe.xrange(keys.groups)
        pipe.xrange(keys.batches)
        pipe.xrange(keys.ledger(policy), cursor)
        pipe.hgetall(keys.state)
        raw_groups, raw_batches, raw_tail, raw_state = await pipe.execute()
    ledger += [from_entry(LedgerEntry, fields) for _, fields in raw_tail]
    queued = [from_entry(GroupEntry, fields) for _, fields in raw_groups]
    committed = {entry.step: entry for entry in ledger}
    batches = [from_entry(BatchEntry, fields) for _, fields in raw_batches]
    open_batches = [batch for batch in batches if batch.step not in committed]
    version = await broker.weights.newest(policy)

    report = AuditReport(
        policy=policy,
        accepted=int(raw_state.get(b"accepted", 0)),
        trained=sum(len(entry.gids) for entry in ledger),
        open=sum(len(batch.gids) for batch in open_batches),
        queued=len(queued),
        steps=len(ledger),
        newest_version=version.version if version else -1,
    )
    find = report.findings.append

    steps = Counter(entry.step for entry in ledger)
    if twice := [step for step, count in steps.items() if count > 1]:
        find(f"steps committed more than once: {_some(twice)}")
    formed = int(raw_state.get(b"formed", 0))
    kept = {batch.step for batch in batches}
    if missing := [step for step in range(1, formed + 1) if step not in committed and step not in kept]:
        find(f"batches formed and neither committed nor kept: {_some(missing)}")

    places = Counter(gid for entry in ledger for gid in entry.gids)
    places.update(gid for batch in open_batches for gid in batch.gids)
    places.update(entry.gid for entry in queued)
    if repeated := [gid for gid, count in places.items() if count > 1]:
        find(f"groups in more than one place: {_some(repeated)}")
    if len(places) != report.accepted:
        find(f"{report.accepted} groups were accepted, {len(places)} are accounted for")
    for batch in batches:
        if batch.step in committed and batch.gids != committed[batch.step].gids:
            find(f"step {batch.step} was committed with other groups than its batch holds")

    waiting = [gid for batch in open_batches for gid in batch.gids] + [entry.gid for entry in queued]
    if lost := [gid for gid in waiting if not await redis.exists(keys.blob(gid)) and await _still_waiting(broker, gid)]:
        find(f"groups waiting without their data: {_some(lost)}")
    return report


async def _still_waiting(broker: Broker, gid: str) -> bool:
    """Whether the group is still unretired: on a live run it may have been trained and freed since the snapshot."""
    queued = {entry.gid for _, entry in await broker.queue.queued()}
    batched = {gid for batch in await broker.queue.batches() for gid in batch.gids}
    return gid in queued or gid in batched


def _some(values: list[int] | list[str]) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return shown if len(values) <= SHOWN else f"{shown} and {len(values) - SHOWN} more"

"""Is every accepted group in exactly one place? In a committed step, on its way to one, or a dead letter. From Redis alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec import Struct, field

from lachesis.broker.client import Broker
from lachesis.broker.queue.counters import read_status
from lachesis.broker.queue.queue import read_ledger
from lachesis.broker.records.entries import IDS, id_number, read_entries, read_number
from lachesis.broker.records.groups import DeadEntry, GroupEntry
from lachesis.broker.records.steps import BatchEntry, LedgerEntry, QueueStatus

SHOWN = 5  # examples named in a finding


class AuditReport(Struct):
    """Counts of accepted groups by where they are, and what contradicts the guarantees; no findings: clean."""

    policy: str
    accepted: int
    trained: int  # groups in committed steps
    open: int  # groups in formed, uncommitted batches
    queued: int
    dead: int  # dead letters
    purged: int  # dead letters that somebody gave up
    skipped: int  # groups of batches that this policy skipped or gave up, and others may train
    unseen: int  # groups that had come and gone when this policy joined
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
    ledger: list[LedgerEntry] = []
    cursor = "-"
    while found := await redis.xrange(keys.ledger(policy), cursor, count=1000):
        ledger += read_ledger(found)
        cursor = f"({found[-1][0].decode()}"
    async with redis.pipeline(transaction=True) as pipe:
        pipe.xrange(keys.groups)
        pipe.xrange(keys.batches)
        pipe.xrange(keys.ledger(policy), cursor)
        pipe.xrange(keys.dead)
        pipe.hgetall(keys.skipped)
        pipe.hgetall(keys.state)
        raw_groups, raw_batches, raw_tail, raw_dead, raw_skipped, raw_state = await pipe.execute()
    ledger += read_ledger(raw_tail)
    queued = [entry for _, entry in read_entries(GroupEntry, raw_groups)]
    committed = {entry.step: entry for entry in ledger}
    batches = [entry for _, entry in read_entries(BatchEntry, raw_batches)]
    skipped = _steps_of(policy, raw_skipped)
    open_batches = [batch for batch in batches if batch.step not in committed and batch.step not in skipped]
    dead = [entry.gid for _, entry in read_entries(DeadEntry, raw_dead)]
    without = [gid for gids in skipped.values() for gid in gids]
    purged = int(raw_state.get(b"purged", 0))
    unseen = int(raw_state.get(f"unseen:{policy}".encode(), 0))
    joined = int(raw_state.get(f"joined:{policy}".encode(), 0))  # the step formed last by then
    version = await broker.weights.newest(policy)

    report = AuditReport(
        policy=policy,
        accepted=int(raw_state.get(b"accepted", 0)),
        trained=sum(len(entry.gids) for entry in ledger),
        open=sum(len(batch.gids) for batch in open_batches),
        queued=len(queued),
        dead=len(dead),
        purged=purged,
        skipped=len(without),
        unseen=unseen,
        steps=len(ledger),
        newest_version=version.version if version else -1,
    )
    find = report.findings.append

    steps = Counter(entry.step for entry in ledger)
    if twice := [step for step, count in steps.items() if count > 1]:
        find(f"steps committed more than once: {_some(twice)}")
    formed = int(raw_state.get(b"formed", 0))
    kept = {batch.step for batch in batches}
    gone = [step for step in range(joined + 1, formed + 1) if step not in kept]
    if missing := [step for step in gone if step not in committed and step not in skipped]:
        find(f"batches formed and neither committed nor kept: {_some(missing)}")
    if both := [step for step in skipped if step in committed]:
        find(f"steps both committed and given up: {_some(both)}")

    undelivered = [batch for batch in batches if batch.step > int(raw_state.get(b"delivered", 0))]
    wrong = _miscounted(read_status(raw_state), queued, undelivered, dead)
    wrong += _miscounted_bytes(raw_state, queued, batches)
    if wrong:
        find(f"counters that contradict the queue: {', '.join(wrong)}")

    # a group whose post came again after it was trained and freed has the same id: only what is still here is of one post
    freed = Counter(gid for step, entry in committed.items() if step not in kept for gid in entry.gids)
    here = Counter(gid for step, entry in committed.items() if step in kept for gid in entry.gids)
    here.update(gid for batch in open_batches for gid in batch.gids)
    here.update(entry.gid for entry in queued)
    here.update(dead)
    freed.update(without)
    accounted = freed.total() + here.total() + purged + unseen
    places = here if accounted <= report.accepted else freed + here
    if repeated := [gid for gid, count in places.items() if count > 1]:
        find(f"groups in more than one place: {_some(repeated)}")
    if accounted != report.accepted:
        find(f"{report.accepted} groups were accepted, {accounted} are accounted for")
    elif not _same_ids(raw_state, report, freed + here):
        find("the groups accounted for are not those accepted: some are there too often, and as many not at all")
    for batch in batches:
        if batch.step in committed and batch.gids != committed[batch.step].gids:
            find(f"step {batch.step} was committed with other groups than its batch holds")

    waiting = [gid for batch in open_batches for gid in batch.gids] + [entry.gid for entry in queued] + dead
    if lost := [gid for gid in waiting if not await redis.exists(keys.blob(gid)) and await _still_waiting(broker, gid)]:
        find(f"groups waiting without their data: {_some(lost)}")
    return report


def _same_ids(state: Mapping[bytes, bytes], report: AuditReport, found: Counter[str]) -> bool:
    """Whether they add up to the sum of the accepted ids less those given up (see codec.id_number).

    True where nobody can tell: some groups had gone when the policy joined, or an earlier release accepted some.
    """
    kept = read_number(state.get(b"ids"))
    if b"ids" not in state or report.unseen or (kept - report.accepted + report.purged) % IDS:
        return True
    return kept == sum(id_number(gid) * times for gid, times in found.items())


def _miscounted(
    status: QueueStatus, queued: Sequence[GroupEntry], undelivered: Sequence[BatchEntry], dead: Sequence[str]
) -> list[str]:
    """The counters that FORM and status answers rely on, where they are not what a recount gives."""
    waiting: dict[str, Counter[int]] = {}
    for entry in queued:
        waiting.setdefault(entry.env, Counter())[entry.n] += 1
    recounted = {
        "groups": len(queued) + sum(len(batch.gids) for batch in undelivered),
        "sequences": sum(entry.n for entry in queued) + sum(batch.n for batch in undelivered),
        "bytes": sum(entry.bytes for entry in queued),
        "waiting": waiting,
        "dead": len(dead),
    }
    return [
        f"{name} {getattr(status, name)}, recounted {value}"
        for name, value in recounted.items()
        if getattr(status, name) != value
    ]


async def _still_waiting(broker: Broker, gid: str) -> bool:
    """Whether the group is still unretired: on a live run it may have been trained and freed since the snapshot."""
    queued = {entry.gid for _, entry in await broker.queue.queued()}
    batched = {gid for batch in await broker.queue.batches() for gid in batch.gids}
    return gid in queued or gid in batched or gid in {letter.entry.gid for letter in await broker.dead.accepted()}


def _steps_of(policy: str, raw: Mapping[bytes, bytes]) -> dict[int, list[str]]:
    """Steps that the policy gave up, and their groups; none where they became dead letters."""
    prefix = f"{policy}:".encode()
    return {
        int(field.removeprefix(prefix)): gids.decode().split()
        for field, gids in raw.items()
        if field.startswith(prefix)
    }


def _miscounted_bytes(
    state: Mapping[bytes, bytes], queued: Sequence[GroupEntry], batches: Sequence[BatchEntry]
) -> list[str]:
    """The same of the counters that quotas and retention rely on."""
    recounted = Counter({"kept_bytes": sum(batch.bytes for batch in batches)})
    for entry in queued:
        recounted[f"env_sequences:{entry.env}"] += entry.n
        recounted[f"env_bytes:{entry.env}"] += entry.bytes
    told = {
        name.decode(): int(value)
        for name, value in state.items()
        if name == b"kept_bytes" or name.startswith((b"env_sequences:", b"env_bytes:"))
    }
    return [
        f"{name} {told.get(name, 0)}, recounted {recounted[name]}"
        for name in sorted(recounted.keys() | told.keys())
        if told.get(name, 0) != recounted[name]
    ]


def _some(values: list[int] | list[str]) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return shown if len(values) <= SHOWN else f"{shown} and {len(values) - SHOWN} more"

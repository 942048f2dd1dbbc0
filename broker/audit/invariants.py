"""What must be true of a run at any instant, one function each: it yields what contradicts it, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

from lachesis.broker.audit.snapshot import Snapshot
from lachesis.broker.client import Broker
from lachesis.broker.queue.counters import read_status
from lachesis.broker.records.entries import IDS, id_number, read_number

SHOWN = 5  # examples named in a finding
SLICE = 1000  # blobs asked for at a time


def steps_once(snapshot: Snapshot) -> Iterator[str]:
    """No step has two entries in the ledger."""
    steps = Counter(entry.step for entry in snapshot.ledger)
    if twice := [step for step, count in steps.items() if count > 1]:
        yield f"steps committed more than once: {_some(twice)}"


def formed_are_kept_or_committed(snapshot: Snapshot) -> Iterator[str]:
    """Every batch formed since the policy joined is committed, given up, or still there."""
    kept = {batch.step for batch in snapshot.batches}
    formed = range(snapshot.joined + 1, snapshot.count("formed") + 1)
    gone = [step for step in formed if step not in kept]
    if missing := [step for step in gone if step not in snapshot.committed and step not in snapshot.given_up]:
        yield f"batches formed and neither committed nor kept: {_some(missing)}"


def none_both_committed_and_given_up(snapshot: Snapshot) -> Iterator[str]:
    if both := [step for step in snapshot.given_up if step in snapshot.committed]:
        yield f"steps both committed and given up: {_some(both)}"


def counters_agree(snapshot: Snapshot) -> Iterator[str]:
    """The counters that forming a batch, status answers, quotas and retention rely on are what a recount gives."""
    if wrong := _miscounted(snapshot) + _miscounted_bytes(snapshot):
        yield f"counters that contradict the queue: {', '.join(wrong)}"


def each_group_in_one_place(snapshot: Snapshot) -> Iterator[str]:
    places = snapshot.places
    counted = places.here if snapshot.accounted <= snapshot.count("accepted") else places.all
    if repeated := [gid for gid, count in counted.items() if count > 1]:
        yield f"groups in more than one place: {_some(repeated)}"


def all_accounted_for(snapshot: Snapshot) -> Iterator[str]:
    """As many groups are known of as were accepted, and they are the same ones."""
    accepted = snapshot.count("accepted")
    if snapshot.accounted != accepted:
        yield f"{accepted} groups were accepted, {snapshot.accounted} are accounted for"
    elif not _same_ids(snapshot):
        yield "the groups accounted for are not those accepted: some are there too often, and as many not at all"


def committed_as_formed(snapshot: Snapshot) -> Iterator[str]:
    for batch in snapshot.batches:
        entry = snapshot.committed.get(batch.step)
        if entry and batch.gids != entry.gids:
            yield f"step {batch.step} was committed with other groups than its batch holds"


async def waiting_have_data(snapshot: Snapshot, broker: Broker) -> AsyncIterator[str]:
    """Each group that waits has its blob. One that is freed since the snapshot, on a live run, is none that waits."""
    gone = await _without_data(broker, snapshot.waiting)
    still = await _still_waiting(broker) if gone else set()
    if lost := [gid for gid in gone if gid in still]:
        yield f"groups waiting without their data: {_some(lost)}"


INVARIANTS: tuple[Callable[[Snapshot], Iterator[str]], ...] = (
    steps_once,
    formed_are_kept_or_committed,
    none_both_committed_and_given_up,
    counters_agree,
    each_group_in_one_place,
    all_accounted_for,
    committed_as_formed,
)


def _miscounted(snapshot: Snapshot) -> list[str]:
    status = read_status(snapshot.state)
    undelivered = [batch for batch in snapshot.batches if batch.step > snapshot.count("delivered")]
    waiting: dict[str, Counter[int]] = {}
    for entry in snapshot.queued:
        waiting.setdefault(entry.env, Counter())[entry.n] += 1
    recounted = {
        "groups": len(snapshot.queued) + sum(len(batch.gids) for batch in undelivered),
        "sequences": sum(entry.n for entry in snapshot.queued) + sum(batch.n for batch in undelivered),
        "bytes": sum(entry.bytes for entry in snapshot.queued),
        "waiting": waiting,
        "dead": len(snapshot.dead),
    }
    return [
        f"{name} {getattr(status, name)}, recounted {value}"
        for name, value in recounted.items()
        if getattr(status, name) != value
    ]


def _miscounted_bytes(snapshot: Snapshot) -> list[str]:
    """Of the counters that quotas and retention rely on."""
    recounted = Counter({"kept_bytes": sum(batch.bytes for batch in snapshot.batches)})
    for entry in snapshot.queued:
        recounted[f"env_sequences:{entry.env}"] += entry.n
        recounted[f"env_bytes:{entry.env}"] += entry.bytes
    counted = {
        name.decode(): int(value)
        for name, value in snapshot.state.items()
        if name == b"kept_bytes" or name.startswith((b"env_sequences:", b"env_bytes:"))
    }
    return [
        f"{name} {counted.get(name, 0)}, recounted {recounted[name]}"
        for name in sorted(recounted.keys() | counted.keys())
        if counted.get(name, 0) != recounted[name]
    ]


def _same_ids(snapshot: Snapshot) -> bool:
    """Whether they add up to the sum of the accepted ids less those given up (see entries.id_number).

    True where nobody can tell: some groups had gone when the policy joined, or an earlier release accepted some.
    """
    kept, counted = read_number(snapshot.state.get(b"ids")), snapshot.count("accepted") - snapshot.count("purged")
    if b"ids" not in snapshot.state or snapshot.unseen or (kept - counted) % IDS:
        return True
    return kept == sum(id_number(gid) * times for gid, times in snapshot.places.all.items())


async def _without_data(broker: Broker, gids: list[str]) -> list[str]:
    gone = []
    for start in range(0, len(gids), SLICE):
        part = gids[start : start + SLICE]
        async with broker.redis.pipeline(transaction=False) as pipe:
            for gid in part:
                pipe.exists(broker.keys.blob(gid))
            found = await pipe.execute()
        gone += [gid for gid, exists in zip(part, found, strict=True) if not exists]
    return gone


async def _still_waiting(broker: Broker) -> set[str]:
    """Ids of the groups that are not freed by now."""
    queued = {entry.gid for _, entry in await broker.queue.queued()}
    batched = {gid for batch in await broker.queue.batches() for gid in batch.gids}
    return queued | batched | {letter.entry.gid for letter in await broker.dead.accepted()}


def _some(values: list[int] | list[str]) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return shown if len(values) <= SHOWN else f"{shown} and {len(values) - SHOWN} more"

"""Groups of an archive, or of another run, into a run: in the order in which they were batched, by the ordinary PUT."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from msgspec import Struct, field
from redis.exceptions import RedisError

from lachesis.broker.archive.segments import Archive
from lachesis.broker.client import Broker
from lachesis.broker.errors import InvalidGroup
from lachesis.broker.queue.admission import admit_stored
from lachesis.broker.records.blobs import CODEC
from lachesis.broker.records.entries import SHOWN, gid_of, read_entries
from lachesis.broker.records.groups import LONGEST_WINDOW_S, Group, GroupEntry, Limits
from lachesis.broker.records.steps import BatchEntry
from lachesis.broker.store.redis_errors import describe, trouble

ROOM_POLL_S = 0.25
DUPLICATE_WINDOW_S = (
    LONGEST_WINDOW_S  # one that was interrupted is started again by somebody, not by a client that waits
)
FULL = "the queue is full"


class Selection(Struct, frozen=True):
    """Which groups: all bounds are inclusive, None is none."""

    steps: tuple[int | None, int | None] = (None, None)
    versions: tuple[int | None, int | None] = (None, None)  # of every token of a group
    times: tuple[float | None, float | None] = (None, None)  # seconds since the epoch: when a batch was formed

    def batch(self, step: int, formed_at: float) -> bool:
        return within(step, self.steps) and within(formed_at, self.times)

    def group(self, group: Group) -> bool:
        return within(group.v_min, self.versions) and within(group.v_max, self.versions)


def within(value: float, bounds: tuple[float | None, float | None]) -> bool:
    low, high = bounds
    return (low is None or low <= value) and (high is None or value <= high)


class Part(Struct, frozen=True):
    """Groups that belong together: a batch (of `step`), or queued ones (0)."""

    step: int
    groups: list[Group]
    origin: str = ""  # where they are kept, in words


class Notes(Struct, frozen=True):
    """Who is told, in a line each: `note` of what is missing, `refuse` of what is there and can't be replayed."""

    note: Callable[[str], None]
    refuse: Callable[[str], None]


async def from_archive(archive: Archive, chosen: Selection, notes: Notes) -> AsyncIterator[Part]:
    """The chosen groups of an archive. What can't be read is refused, and the rest goes on."""
    first, last = chosen.steps
    batches = archive.read(first or 1, last, note=notes.note, refuse=notes.refuse)
    foreign = set()
    while (archived := await asyncio.to_thread(next, batches, None)) is not None:
        step, segment = archived.batch.step, archived.segment
        if archived.codec != CODEC:
            if segment not in foreign:
                foreign.add(segment)
                notes.refuse(
                    f"{segment}: codec = {archived.codec!r}: this version reads {CODEC!r}; replay it with the one that wrote it"
                )
        elif chosen.batch(step, archived.batch.formed_at):
            origin = f"{segment}, step {step}"
            groups = _admitted(archived.batch.gids, archived.blobs, origin, notes)
            yield Part(step, [group for group in groups if chosen.group(group)], origin)


def _admitted(gids: Sequence[str], blobs: Sequence[bytes], origin: str, notes: Notes) -> Iterator[Group]:
    for gid, blob in zip(gids, blobs, strict=True):
        try:
            yield admit_stored(blob, gid)
        except InvalidGroup as error:
            notes.refuse(refusal(origin, gid, error))


def refusal(origin: str, gid: str, error: InvalidGroup) -> str:
    """In a line: where the group is, its id, field, value and rule."""
    return f"{origin}, group {gid[:SHOWN]!r}: {str(error)[:SHOWN]}"


async def from_run(source: Broker, chosen: Selection, notes: Notes) -> AsyncIterator[Part]:
    """The chosen groups that a run holds now: its kept batches, then, unless steps are chosen, its queue."""
    redis, keys = source.redis, source.keys
    raw_groups = await redis.xrange(keys.groups)  # first: a group goes from the queue into a batch, not back
    batches = [entry for _, entry in read_entries(BatchEntry, await redis.xrange(keys.batches))]
    batched = {gid for batch in batches for gid in batch.gids}
    for batch in batches:
        if not chosen.batch(batch.step, batch.formed_at):
            continue
        try:
            blobs = await source.queue.blobs(batch.gids)
        except LookupError:
            notes.note(f"step {batch.step} was trained and freed before it was read")
            continue
        origin = f"run {source.keys.run}, step {batch.step}"
        groups = _admitted(batch.gids, blobs, origin, notes)
        yield Part(batch.step, [group for group in groups if chosen.group(group)], origin)
    if chosen.steps != (None, None):
        return
    for id_, entry in read_entries(GroupEntry, raw_groups):
        if not within(int(id_.split(b"-")[0]) / 1000, chosen.times):
            continue
        if entry.gid in batched:
            continue
        try:
            blobs = await source.queue.blobs([entry.gid])
        except LookupError:
            notes.note(f"group {entry.gid} was trained and freed before it was read")
            continue
        origin = f"run {source.keys.run}, queued"
        groups = _admitted([entry.gid], blobs, origin, notes)
        yield Part(0, [group for group in groups if chosen.group(group)], origin)


class Replayed(Struct):
    """What a replay did so far."""

    batches: int = 0
    groups: int = 0
    sequences: int = 0
    tokens: int = 0
    stored: int = 0  # groups that the run did not have
    waiting: str = ""  # why it waits now
    times: Counter[str] = field(default_factory=Counter)  # how often each group came

    def next_id(self, gid: str) -> str:
        """The id to store a group under: its own, or, where a post was repeated and trained again, another each time."""
        self.times[gid] += 1
        return gid if self.times[gid] == 1 else gid_of(f"{gid}[{self.times[gid]}]".encode())

    def count(self, part: Part) -> None:
        self.batches += bool(part.step and part.groups)
        self.groups += len(part.groups)
        self.sequences += sum(len(group.tokens) for group in part.groups)
        self.tokens += sum(len(row) for group in part.groups for row in group.tokens)


async def store(
    target: Broker,
    part: Part,
    done: Replayed,
    *,
    policy: str,
    keep_versions: bool,
    quota: int,
    tell: Callable[[], None],
    refuse: Callable[[str], None] | None = None,
) -> None:
    """Put the groups into the target run, waiting while its queue or its Redis is full; counts in `done`.

    They are stamped with the policy's newest version there, or with `keep_versions` with the versions they came with.
    One that PUT refuses is told to `refuse`; without it InvalidGroup is raised.
    """
    newest = await target.weights.newest(policy)
    version = newest.version if newest else 0
    kept = []
    for group in part.groups:
        if not keep_versions:
            group.v_min, group.v_max, group.versions = version, version, None
        try:
            reply = await _put(target, done.next_id(group.gid), group, done, quota, tell)
        except InvalidGroup as error:
            if refuse is None:
                raise
            refuse(refusal(part.origin, group.gid, error))
            continue
        kept.append(group)
        done.stored += reply == "stored"
    done.count(Part(part.step, kept))
    tell()


async def _put(target: Broker, gid: str, group: Group, done: Replayed, quota: int, tell: Callable[[], None]) -> str:
    """ "stored" or "duplicate", once there is room."""
    limits = Limits(bytes=quota)
    while True:
        try:
            reply = await target.queue.put(
                gid, group, v_min=group.v_min, v_max=group.v_max, limits=limits, window_s=DUPLICATE_WINDOW_S
            )
        except RedisError as error:
            if trouble(error) is None:
                raise
            reply = describe(error)
        if reply in ("stored", "duplicate"):
            done.waiting = ""
            return reply
        if reply == "full" and await target.queue.starves():
            limits = Limits()
            continue
        done.waiting = FULL if reply == "full" else reply
        tell()
        await asyncio.sleep(ROOM_POLL_S)

"""The life of a group: PUT into the queue, FORM into a batch, LEASE, COMMIT, RETIRE."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from msgspec import structs
from redis.exceptions import ResponseError

from lachesis.broker import allot
from lachesis.broker.codec import flat_entry, from_entry, read_entries, read_json, tell_once, to_entry, warn
from lachesis.broker.connection import Redis, wait_for_entries
from lachesis.broker.dead import compressed
from lachesis.broker.errors import ConfigurationError, LeaseLost, Unreadable
from lachesis.broker.forming import Forming, read_status
from lachesis.broker.keys import ARCHIVE, Keys
from lachesis.broker.lua import Scripts
from lachesis.broker.packing import from_blob, pack, queue_entry, to_arrays, to_blob
from lachesis.broker.records import (
    DUPLICATE_WINDOW_S,
    MAX_DELIVERIES,
    BatchEntry,
    DeadEntry,
    EnvRecord,
    Group,
    GroupEntry,
    Lease,
    LedgerEntry,
    Limits,
    QueueStatus,
    ScoredGroup,
    TrainerConfig,
)
from lachesis.broker.redis_errors import trouble
from lachesis.broker.refit import Refit
from lachesis.broker.retention import Retention
from lachesis.broker.shadows import Rule, Shadows
from lachesis.broker.staleness import Staleness
from lachesis.broker.validation import check_bounds, check_id

BLOB_TTL_S = 600  # a blob not yet in the queue expires after this
AGAIN = "~"  # between a post's id and what tells its groups apart, where one is still kept and the next is accepted
SLICE_BYTES = 8 << 20  # blobs are fetched in replies of at most this size, or one by one
SLICE_GROUPS = 10_000  # and of so many
REFUSED_KEPT = 10_000  # refused posts
REFUSED_TTL_S = 7 * 24 * 3600
REFUSED_BYTES = 64 << 20  # of the bodies of all of them, compressed
ROOMY = 0.7  # share of maxmemory above which no refused post is kept

NO_LIMITS = Limits()


class Believed(NamedTuple):
    """What a caller of PUT holds true of the run without having asked again: this, and that nobody serves its weights."""

    policy: str
    registration: bytes  # of the trainer, as it is kept; empty for none
    newest: bytes  # entry id of the policy's newest version; empty for none


class Queue:
    """Groups and batches of one run. A policy reads batches as the consumer group of its name."""

    def __init__(self, redis: Redis, blocking: Redis, heartbeats: Redis, scripts: Scripts, keys: Keys) -> None:
        self._redis, self._blocking, self._heartbeats = redis, blocking, heartbeats
        self._scripts, self._keys = scripts, keys
        self._caller, self._calls = os.urandom(6).hex(), count()
        self.staleness = Staleness(redis, scripts, keys)
        self.shadows = Shadows(redis, keys)
        self.retention = Retention(redis, scripts, keys, self.shadows)
        self.refit = Refit(redis, scripts, keys)
        self._forming = Forming(redis, scripts, keys, self.staleness, self.refit)

    # -- PUT ------------------------------------------------------------------------------------------------------

    async def put(
        self,
        gid: str,
        group: Group | ScoredGroup,
        *,
        v_min: int,
        v_max: int,
        limits: Limits = NO_LIMITS,
        packed: bytes = b"",
        believed: Believed | None = None,
        digest: str = "",
        window_s: int = DUPLICATE_WINDOW_S,
        account: str = "",
    ) -> str:
        """Store a valid group durably, once. Returns "stored"; or, and then nothing is stored, "duplicate"; or what it is
        over: "late" (max_lag), "full" (a quota of the queue), "env_full" (a quota of its environment); or "changed": what
        is `believed` of the run is not so.

        A group of the same `gid` is a duplicate for `window_s` after the first was accepted, and for as long as that one
        is neither trained nor given up. After that it is a group of its own, with another id where the first is still
        kept. Where the id is not made of the body, `digest` is: another body under a known id is a "conflict".

        Raises InvalidGroup for an id or versions that no group can have; the rest is for `admit` to see.

        `packed` is the group's packed form where the caller has it already: it is stored as it is. `account` is what the
        group is counted under, if that is not its environment's id.
        """
        if isinstance(group, ScoredGroup):
            group = to_arrays(group)
        check_id(gid)
        check_bounds(v_min, v_max)
        packed = packed or pack(group)
        names, post, call = self._keys, gid, f"{self._caller}{next(self._calls):x}"
        quotas = [limits.bytes, limits.sequences, limits.env_bytes, limits.env_sequences]
        lag = ["" if limits.max_lag is None else limits.max_lag, believed.policy if believed else limits.policy]
        belief = [1, believed.registration, believed.newest] if believed else [0, "", ""]
        while True:
            blob = to_blob(
                packed,
                gid,
                v_min=v_min,
                v_max=v_max,
                versions=group.versions,
                sampled_logprobs=group.sampled_logprobs,
            )
            entry = queue_entry(structs.replace(group, gid=gid, v_min=v_min, v_max=v_max), len(blob))
            if account and account != entry.env:
                entry = structs.replace(entry, env=account)
            keys = [names.groups, names.blob(gid), names.seen(post), names.state, names.trainers]
            keys += [names.pools, names.lineage, names.old_lineage, names.trained]
            fields = [text for pair in to_entry(entry).items() for text in pair]
            memory = [window_s, call, digest, post]
            args = [*memory, *quotas, *lag, *belief, entry.env, entry.n, entry.bytes, *fields]
            store = ("SET", names.blob(gid), blob, "NX", "EX", BLOB_TTL_S)
            reply = bytes(await self._scripts.put(keys=keys, args=args, after=store)).decode()
            if reply.startswith("trained "):
                gid = reply.removeprefix("trained ")
            elif reply == "unfinished":
                return "duplicate" if not digest or await self._holds(gid, group) else "conflict"
            elif reply != "noblob":  # the blob's TTL ran out in between: set it again
                return reply

    async def _holds(self, gid: str, group: Group) -> bool:
        """Whether the stored group `gid` is what was posted as `group`; yes if it was freed just now."""
        try:
            (stored,) = await self.fetch([gid])
        except LookupError:
            return True
        return pack(structs.replace(stored, versions=None)) == pack(structs.replace(group, versions=None))

    async def bury(self, gid: str, body: bytes, reason: str, detail: str, *, most_bytes: int = REFUSED_BYTES) -> None:
        """Keep what was refused for triage: stream `refused`, the beginning of the body as its blob for a week.

        The oldest make room where there are too many, or their bodies have more than `most_bytes` together. While Redis is
        nearly full it is only counted.
        """
        fields = [*flat_entry(DeadEntry(gid, reason, deliveries=0, detail=detail)), "size", str(len(body))]
        keys = self._keys
        await self._scripts.bury(
            keys=[keys.refused, keys.blob(gid), keys.state],
            args=[compressed(body), REFUSED_TTL_S, REFUSED_KEPT, most_bytes, ROOMY, *fields],
        )

    # -- FORM -----------------------------------------------------------------------------------------------------

    async def form(self, batch_size: int, policy: str = "main") -> int | None:
        """Form the next batch (see forming.py). Returns its step, or None if the queue can't make one yet.

        Groups that are too stale by now are dropped on the way. Where other settings were registered, all is first made
        to fit them (see refit.py), on behalf of `policy`.
        """
        return await self._forming.form(batch_size, policy)

    async def starves(self) -> bool:
        """Whether the registered trainer would get no batch now: then no limit holds a group back, it may be the missing one.

        No where none has registered, and nobody knows what a batch is. From the counters.
        """
        config = read_json(TrainerConfig, await self._redis.hget(self._keys.trainers, "config"))
        return config is not None and not makes_batch(await self.status(), config.batch_size)

    async def queued(self, count: int | None = None) -> list[tuple[str, GroupEntry]]:
        """(entry id, entry) of queued groups, oldest first."""
        found = await self._redis.xrange(self._keys.groups, count=count)
        return [(id_.decode(), entry) for id_, entry in read_entries(GroupEntry, found)]

    async def newest_group(self) -> str:
        """Where the queue's stream ends now; what `wait_for_group` counts from."""
        try:
            return bytes((await self._redis.xinfo_stream(self._keys.groups))["last-generated-id"]).decode()
        except ResponseError as error:  # no group was ever accepted
            if trouble(error):
                raise
            return "0-0"

    async def wait_for_group(self, timeout_s: float, *, after: str = "") -> None:
        """Return when a group newer than `after` (empty: than this call) has been accepted, or after `timeout_s`."""
        await wait_for_entries(self._blocking, self._keys.groups, after or await self.newest_group(), timeout_s)

    # -- LEASE and COMMIT -----------------------------------------------------------------------------------------

    async def subscribe(self, policy: str, shadow: Rule | None = None) -> None:
        """Make `policy` a reader of all batches that are still there, by `shadow` or as no shadow. Harmless to repeat."""
        if policy == ARCHIVE:
            raise ConfigurationError(f"policy = {policy!r}: that name is the archiver's; choose another")
        keys = [self._keys.batches, self._keys.state, self._keys.settings]
        await self._scripts.subscribe(keys=keys, args=[policy, str(shadow or "")])

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
        keys = self._keys
        while True:
            gone, *lent = await self._scripts.lease(
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
                tell_once(str(error))
                await self.refit(policy, apart=[step])  # which leaves one batch less
                continue
            return Lease(batch=batch, consumer=consumer, deliveries=int(deliveries))

    async def upcoming(self, policy: str, after: int) -> BatchEntry | None:
        """What `lease` lends to a reader that has step `after` in work once that is committed, if it is formed already.

        A look that changes nothing: the batch goes on counting as queued. Raises Redis's NOGROUP if `policy` does not
        read (any more).
        """
        batches = self._keys.batches
        pending = await self._redis.xpending_range(batches, policy, f"({after}-0", "+", 1)
        if pending:
            start = pending[0]["message_id"].decode()
        else:
            readers = await self._redis.xinfo_groups(batches)
            delivered = {reader["name"]: reader["last-delivered-id"].decode() for reader in readers}
            start = f"({delivered.get(policy.encode(), '0-0')}"
            rule = (await self.shadows.rules()).get(policy)
            if rule is not None and rule.kind == "lossy":
                skipped = int(await self._redis.hget(self._keys.state, "formed") or 0) - rule.max_behind
                start = f"({max(skipped, int(start[1:].partition('-')[0]))}-0"
        while found := await self._redis.xrange(batches, start, count=1):
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
            if lease is None and await self.form(batch_size, policy) is not None:
                lease = await self.lease(policy, consumer, lapse_s=lapse_s, max_deliveries=max_deliveries)
            if lease is None or lease.batch.n == batch_size:
                return lease
            await self.refit(policy, apart=[lease.batch.step])

    async def deliver(self, step: int) -> bool:
        """Batches up to `step` count as delivered from now on. False if they did already."""
        return bool(await self._scripts.deliver(keys=[self._keys.batches, self._keys.state], args=[step]))

    async def renew(self, policy: str, lease: Lease) -> bool:
        """Keep a lease alive: resets its idle time without counting as a delivery. False if it is not ours any more."""
        reply = await self._scripts.renew(
            keys=[self._keys.batches], args=[policy, lease.consumer, lease.batch.step], client=self._heartbeats
        )
        return bool(reply == b"renewed")

    async def lacks(self, gids: Sequence[str]) -> bool:
        """Whether the data of one of these groups is gone."""
        for start in range(0, len(gids), 1000):
            part = [self._keys.blob(gid) for gid in gids[start : start + 1000]]
            if await self._redis.exists(*part) < len(part):
                return True
        return False

    async def fetch(self, gids: Sequence[str]) -> list[Group]:
        """The groups themselves, in order. Raises LookupError naming a missing one."""
        return [from_blob(blob) for blob in await self.blobs(gids)]

    async def blobs(self, gids: Sequence[str]) -> list[bytes]:
        """The groups as they are stored, in order: `packing.from_blob` reads one. The same LookupError."""
        blobs: list[bytes] = []
        async for part in self._slices(gids):
            found = await self._redis.mget([self._keys.blob(gid) for gid in part])
            for gid, blob in zip(part, found, strict=True):
                if blob is None:
                    raise LookupError(f"group {gid} has no blob: it was retired, or its run was reset")
            blobs += found
        return blobs

    async def _slices(self, gids: Sequence[str]) -> AsyncIterator[Sequence[str]]:
        """Groups that are next to each other and have about SLICE_BYTES together, by what each one has."""
        if len(gids) == 1:
            yield gids
            return
        for start in range(0, len(gids), SLICE_GROUPS):
            part, first, size = gids[start : start + SLICE_GROUPS], 0, 0
            lengths = await self._scripts.lengths(keys=[self._keys.blob(gid) for gid in part])
            for place, length in enumerate(lengths):
                if size and size + length > SLICE_BYTES:
                    yield part[first:place]
                    first, size = place, 0
                size += length
            yield part[first:]

    async def commit(
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
        fields = [text for record in (*untrainable, entry) for pair in to_entry(record).items() for text in pair]
        keys = self._keys
        reply = await self._scripts.commit(
            keys=[keys.batches, keys.ledger(policy), keys.state, keys.writer(policy), keys.refused, keys.trained],
            args=[policy, lease.consumer, step, token, REFUSED_KEPT, len(untrainable), *fields],
        )
        if reply not in (b"committed", b"already"):
            why = {
                b"fenced": "another process writes this policy now",
                b"stolen": "its lease lapsed and another consumer took it",
                b"gone": "nobody holds it",
            }[reply]
            raise LeaseLost(f"step {step} of policy {policy!r} can't be committed: {why}")

    # -- reading back ---------------------------------------------------------------------------------------------

    async def batch(self, step: int) -> BatchEntry | None:
        """A formed batch that is still kept."""
        found = await self._redis.xrange(self._keys.batches, f"{step}-0", f"{step}-0")
        return next((entry for _, entry in read_entries(BatchEntry, found)), None)

    async def batches(self) -> list[BatchEntry]:
        return [entry for _, entry in read_entries(BatchEntry, await self._redis.xrange(self._keys.batches))]

    async def ledger(self, policy: str) -> AsyncIterator[LedgerEntry]:
        """All trained steps, oldest first, read in slices."""
        start = "-"
        while found := await self._redis.xrange(self._keys.ledger(policy), start, "+", count=1000):
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
        while found := await self._redis.xrevrange(self._keys.ledger(policy), end, count=1):
            if readable := read_ledger(found):
                return readable[0]
            end = f"({found[0][0].decode()}"
        return None

    async def settled(self, policy: str) -> int:
        """The newest step such that it and every earlier one is committed or given up by `policy`; 0 if there is none.

        Not a transaction, which a full Redis refuses: what was delivered first is read first.
        """
        readers = await self._redis.xinfo_groups(self._keys.batches)
        delivered = {reader["name"]: reader["last-delivered-id"] for reader in readers}.get(policy.encode(), b"0-0")
        pending = await self._redis.xpending(self._keys.batches, policy)
        if pending["pending"]:
            return int(pending["min"].split(b"-")[0]) - 1
        return int(delivered.split(b"-")[0])

    async def readers(self) -> list[str]:
        """Policies that read batches; the archiver is none."""
        try:
            names = [reader["name"].decode() for reader in await self._redis.xinfo_groups(self._keys.batches)]
        except ResponseError as error:  # nobody ever subscribed
            if trouble(error):
                raise
            return []
        return sorted(name for name in names if name != ARCHIVE)

    async def retire(self, policy: str, covered: int) -> int:
        """`policy` no longer needs batches up to step `covered`. Frees what nobody needs; returns how many that were."""
        await self.retention.cover(policy, covered)
        return await self.retention.free()

    async def status(self) -> QueueStatus:
        """Counters only: constant time, whatever the queue holds. Formed but undelivered batches count as queued."""
        return read_status(await self._redis.hgetall(self._keys.state))

    async def odd_sequences(self, env: EnvRecord) -> int:
        """Queued sequences of an environment in groups of other sizes than its own, less those that make up its size."""
        counts = dict((await self.status()).waiting.get(str(env.env_id), {}))
        counts.pop(env.config.group_size, None)
        return allot.left_over(counts, env.config.group_size)


def makes_batch(status: QueueStatus, batch_size: int) -> bool:
    """Whether a trainer that asks now gets a batch that none has had yet."""
    return status.formed > status.delivered or allot.attainable(status.waiting, {}, batch_size) is not None


def read_ledger(found: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[LedgerEntry]:
    """Entries of a ledger. The step is in their ids, too; only of one that was finished late it is another."""
    whole = [(id_, {b"step": id_.partition(b"-")[0], **fields}) for id_, fields in found]
    return [entry for _, entry in read_entries(LedgerEntry, whole)]

"""The archiver: one more reader of a run's batches, which writes those that were trained to an archive.

It is a consumer group of its own, so RETIRE frees no batch before the archiver has covered it; it covers a batch when its
segment is durable. It borrows nothing: trained batches never change, so it reads them in order from where the archive
ends, which makes any crash harmless. One process at a time holds the right to archive a run; a stale one would only
write a second copy of steps that are there already.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable

import msgspec
from redis.exceptions import LockError, ResponseError
from structlog.stdlib import BoundLogger

from lachesis.broker.archive.segments import Archive, Archived, Header
from lachesis.broker.client import Broker
from lachesis.broker.errors import Conflict, LachesisError, LeaseLost
from lachesis.broker.failpoints import failpoint
from lachesis.broker.queue.commit import read_ledger
from lachesis.broker.queue.lease import add_reader
from lachesis.broker.records.blobs import CODEC
from lachesis.broker.records.entries import read_entries
from lachesis.broker.records.keys import ARCHIVE
from lachesis.broker.records.registrations import ArchiverStatus
from lachesis.broker.records.steps import BatchEntry, LedgerEntry
from lachesis.broker.retention.trained_batches import ARCHIVER

BATCH_POLL_S = 0.25


class Archiver:
    """`await Archiver(…).run(stopping)`; `steps` and `bytes` count what this process archived."""

    def __init__(
        self,
        broker: Broker,
        archive: Archive,
        log: BoundLogger,
        *,
        policy: str,
        segment_bytes: int,
        every_s: float,
        lease_s: float,
    ) -> None:
        self._broker, self._archive, self._log, self._policy = broker, archive, log, policy
        self._segment_bytes, self._every_s, self._lease_s = segment_bytes, every_s, lease_s
        self.who = f"{socket.gethostname()}:{os.getpid()}"
        self._lock = broker.registry.writer(ARCHIVE, ttl_s=lease_s)
        self._over = asyncio.Event()
        self._gathered: list[Archived] = []
        self._since = 0.0  # when the first of them was gathered
        self._seen = self._newest = self._covered = 0  # steps: looked at, archived or not to be, covered
        self.steps = self.bytes = 0

    async def run(self, stopping: Callable[[], bool], *, once: bool = False) -> None:
        """Archive until `stopping`, or with `once` what is trained now.

        Raises Conflict where the archive can't be this run's or another archiver is at work, LeaseLost where one took over.
        """
        await self._take(stopping)
        heartbeat = asyncio.create_task(self._beat())
        try:
            await self._resume()
            while True:
                ending = stopping()
                more = not ending and await self._gather()
                ending |= once and not more
                if self._gathered and (more or ending or time.monotonic() - self._since > self._every_s):
                    await self._flush()
                elif not self._gathered and self._newest > self._covered:
                    await self._cover()
                if ending:
                    return
                if heartbeat.done():
                    heartbeat.result()
                if not more:
                    await asyncio.sleep(BATCH_POLL_S)
        finally:
            self._over.set()  # not cancelled: redis-py may swallow that
            await asyncio.gather(heartbeat, return_exceptions=True)
            with contextlib.suppress(LockError):  # it lapsed
                await self._lock.release()

    # -- the right to archive -------------------------------------------------------------------------------------

    async def _take(self, stopping: Callable[[], bool]) -> None:
        """Become the run's archiver; a killed predecessor's right lapses by itself."""
        until = time.monotonic() + self._lease_s + 1
        while not await self._lock.acquire(blocking=False):
            if time.monotonic() > until or stopping():
                other = await self._broker.queue.retention.archiver()
                who = other.who if other else "another process"
                raise Conflict(f"run {self._broker.keys.run!r} is being archived by {who}: stop that process first")
            await asyncio.sleep(BATCH_POLL_S)

    async def _beat(self) -> None:
        while not self._over.is_set():
            try:
                await self._lock.extend(self._lease_s, replace_ttl=True)
            except LockError:
                raise LeaseLost(f"another process archives run {self._broker.keys.run!r} now") from None
            status = ArchiverStatus(self.who, self._archive.url, self._policy, self.bytes, time.time())
            await self._broker.scripts.set_fields(
                keys=[self._broker.keys.state], args=[ARCHIVER, msgspec.json.encode(status).decode()]
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), self._lease_s / 3)

    # -- where the archive ends -----------------------------------------------------------------------------------

    async def _resume(self) -> None:
        await add_reader(self._broker.view, ARCHIVE)
        covered = (await self._broker.queue.retention.readers()).get(ARCHIVE, 0)
        await asyncio.to_thread(self._archive.prepare)
        found = await asyncio.to_thread(self._archive.newest)
        if found is None:
            self._newest = self._covered = covered
        else:
            header, last = found
            await self._check(header, last, covered)
            self._newest = max(last.step, covered)
            await self._cover()
        self._seen = self._newest
        self._log.info(
            "archiving", run=self._broker.keys.run, policy=self._policy, archive=self._archive.url, after=self._newest
        )

    async def _check(self, header: Header, last: BatchEntry, covered: int) -> None:
        """Raise Conflict unless the archive is of this run's history and lacks nothing of it."""
        run = self._broker.keys.run
        why = ""
        if header.run != run:
            why = f"it is of run {header.run!r}"
        elif last.step < covered and await self._ledger(last.step + 1, covered):
            why = f"it ends at step {last.step}, and batches up to step {covered} went to another place"
        else:
            kept = await self._broker.queue.batch(last.step)
            known = kept or (await self._ledger(last.step, last.step)).get(last.step)
            if known is None or known.gids != last.gids:
                why = f"its step {last.step} is not this run's: the run was reset since"
        if why:
            raise Conflict(f"run {run!r} can't go on in the archive {self._archive.url}: {why}. Give another --to")

    # -- the work -------------------------------------------------------------------------------------------------

    async def _gather(self) -> bool:
        """Read trained batches until a segment is full (True) or there are no more now."""
        if ARCHIVE not in await self._broker.queue.retention.readers():
            raise self._left()
        size = sum(archived.size for archived in self._gathered)
        trained = await self._trained()
        ledger = await self._ledger(self._seen + 1, trained) if trained > self._seen else {}
        while size < self._segment_bytes:
            if trained <= self._seen:
                return False
            start, end = f"{self._seen + 1}-0", f"{trained}-0"
            found = await self._broker.redis.xrange(self._broker.keys.batches, start, end, count=1)
            if not found:  # freed before this run was archived
                self._seen = trained
                return False
            step = int(found[0][0].partition(b"-")[0])
            batch = next((entry for _, entry in read_entries(BatchEntry, found)), None)
            if batch is None or batch.step != step:
                self._seen = self._newest = step  # it can't be archived, and isn't kept for that
                continue
            self._seen = self._newest = batch.step
            if batch.step not in ledger:  # the policy gave it up; it is kept for another one
                continue
            archived = Archived(batch, ledger[batch.step], await self._blobs(batch), CODEC)
            if not self._gathered:
                self._since = time.monotonic()
            self._gathered.append(archived)
            size += archived.size
        return True

    async def _trained(self) -> int:
        """The newest step such that it and all before it are trained; 0 before the policy asked for a batch."""
        try:
            return await self._broker.queue.settled(self._policy)
        except ResponseError as error:
            if "NOGROUP" not in str(error) and "no such key" not in str(error):
                raise
            return 0

    async def _ledger(self, first: int, last: int) -> dict[int, LedgerEntry]:
        """What the ledger says of these steps; one that was finished late stands behind a later one."""
        found: dict[int, LedgerEntry] = {}
        cursor, wanted = f"{first}-0", last - first + 1
        while len(found) < wanted and (
            entries := await self._broker.redis.xrange(self._broker.keys.ledger(self._policy), cursor, count=1000)
        ):
            found |= {entry.step: entry for entry in read_ledger(entries) if first <= entry.step <= last}
            cursor = f"({entries[-1][0].decode()}"
        return found

    async def _blobs(self, batch: BatchEntry) -> list[bytes]:
        try:
            return await self._broker.queue.blobs(batch.gids)
        except LookupError:
            if await self._broker.queue.batch(batch.step) is None:
                raise self._left() from None
            raise

    async def _flush(self) -> None:
        """Write what was gathered as one segment, and only then let go of it in Redis."""
        header = Header(self._broker.keys.run, CODEC, time.time())
        batches, self._gathered = self._gathered, []
        try:
            segment = await asyncio.to_thread(self._archive.write, header, batches)
        except OSError as error:
            raise LachesisError(
                f"can't write to the archive {self._archive.url}: {error}. Nothing was freed that is not in it; start again once that is mended"
            ) from error
        self.steps += len(batches)
        self.bytes += sum(archived.size for archived in batches)
        await self._cover()
        failpoint("segment-covered", segment.first)
        self._log.info("archived", steps=f"{segment.first} to {segment.last}", segment=segment.path)

    async def _cover(self) -> None:
        if not await self._broker.queue.retention.advance_checkpoint(ARCHIVE, self._newest):
            raise self._left()
        self._covered = self._newest
        await self._broker.queue.retention.free()

    def _left(self) -> Conflict:
        return Conflict(
            f"run {self._broker.keys.run!r} is no longer archived: `archive --stop` was called, or it was reset"
        )


async def stop_archiving(broker: Broker) -> bool:
    """Keep nothing for an archiver any more, and free what only it needed. False if there was none."""
    was = await broker.queue.retention.leave(ARCHIVE, ARCHIVER)
    await broker.queue.retention.free()
    return was

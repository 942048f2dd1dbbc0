"""The queue and the batches, made to fit what the registered trainer can train, and counted anew.

A trainer may register with other settings than the one before it, and data may be lost by hand. Then batches that it
can't train are taken apart, their groups go back to the front of the queue, and groups that it can't train become dead
letters: `oversized` (too many sequences for a batch, or one of too many tokens), `lost` (their data is gone) or `unreadable`.
REFIT does all of it at once; here is found out what there is to do. Any replica may, at any time, and again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct
from redis.exceptions import ResponseError

from lachesis.broker.errors import Conflict
from lachesis.broker.failpoints import failpoint
from lachesis.broker.queue.admission import admit
from lachesis.broker.records.blobs import from_blob, queue_entry
from lachesis.broker.records.entries import SHOWN, flat_entry, read_entries, read_json, warn
from lachesis.broker.records.groups import Group, GroupEntry
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.steps import BatchEntry
from lachesis.broker.retention.dead_letters import LOST, OVERSIZED, UNREADABLE
from lachesis.broker.run_view import RunView

ATTEMPTS = 10  # while others register
SLICE = 500  # entries read at a time
BLOBS = 16  # groups read at a time
MOST_OPEN = 1000  # batches lent to a policy's trainers and not committed
REASON = 2  # words of a reason, where an entry would be


class Sizes(NamedTuple):
    """What a trainer takes; as text it is kept as the mark `fitted` once all fits it."""

    batch_size: int
    max_token_len: int

    def __str__(self) -> str:
        return f"{self.batch_size} {self.max_token_len}"

    def why_not(self, n: int, longest: int) -> str:
        """Why a group of `n` sequences, the longest of `longest` tokens, can't be trained; empty if it can."""
        if n > self.batch_size:
            return f"{n} sequences, and batch_size is {self.batch_size}"
        if longest > self.max_token_len:
            return f"a sequence of {longest} tokens, and max_token_len is {self.max_token_len}"
        return ""


def sizes_of(registration: bytes | None) -> Sizes | None:
    """What the registered trainer takes; None if there is none that can be read."""
    config = read_json(TrainerConfig, registration)
    return Sizes(config.batch_size, config.max_token_len) if config else None


def fitted_to(state: Mapping[bytes, bytes]) -> str:
    """The sizes that queue and batches were made to fit last."""
    return state.get(b"fitted", b"").decode(errors="replace")


class Refitted(NamedTuple):
    batches: int  # taken apart
    dead: int  # groups that became dead letters
    unreadable: int  # entries of the queue that were taken out


class _Sent(Struct):
    """Of the batch that an HTTP trainer got (see shim/batch/http_trainers.py): its next call acknowledges it."""

    step: int
    whole: bool


class Refit:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def if_due(self, policy: str) -> bool:
        """Refit if other sizes were registered than all was fitted to. Returns whether it was due."""
        _, sizes, fitted = await self._registered()
        if sizes is None or str(sizes) == fitted:
            return False
        await self(policy)
        return True

    async def __call__(self, policy: str, *, apart: Collection[int] = ()) -> Refitted:
        """Make all fit the registration, and count anew. `apart`: steps whose batches `policy` can't train whatever is registered.

        Raises Conflict if others register all the while.
        """
        for _ in range(ATTEMPTS):
            raw, sizes, _ = await self._registered()
            steps, groups = await self._batches(policy, sizes, apart)
            queued = await self._queued(sizes) if sizes else []
            failpoint("refitting", min(apart, default=0))
            keys = self._view.keys
            reply = await self._view.scripts.refit(
                keys=[keys.groups, keys.batches, keys.state, keys.dead, keys.skipped, keys.trainers],
                args=[raw, str(sizes or ""), policy, len(steps), *steps, len(queued) // 3, *queued, *groups],
            )
            failpoint("refitted", min(apart, default=0))
            if reply is not None:
                done = Refitted(*reply)
                if any(done):
                    warn("refitted", run=keys.run, sizes=str(sizes or ""), **done._asdict())
                return done
        raise Conflict(f"other trainers register with run {self._view.keys.run!r} at this moment: try again")

    async def _registered(self) -> tuple[bytes, Sizes | None, str]:
        """The registration as it is kept, its sizes if it can be read, and what all was fitted to last."""
        async with self._view.redis.pipeline(transaction=False) as pipe:
            pipe.hget(self._view.keys.trainers, "config")
            pipe.hget(self._view.keys.state, "fitted")
            raw, fitted = await pipe.execute()
        return raw or b"", sizes_of(raw), fitted_to({b"fitted": fitted or b""})

    async def why_not(self, group: Group) -> str:
        """Why the registered trainer can't train a group; empty if it can, or nobody has registered."""
        _, sizes, _ = await self._registered()
        return sizes.why_not(len(group.tokens), max(map(len, group.tokens))) if sizes else ""

    # -- batches --------------------------------------------------------------------------------------------------

    async def _batches(
        self, policy: str, sizes: Sizes | None, apart: Collection[int]
    ) -> tuple[list[int], list[str | bytes | int]]:
        """Steps of the batches that can't be trained; and for each group in them (step, gid, entry or reason), in a row."""
        is_shadow = await self._view.redis.hexists(
            self._view.keys.settings, f"shadow:{policy}"
        )  # it trains what another asks for
        arrived, steps, groups = await self._arrived(policy), [], []  # type: set[int], list[int], list[str | bytes | int]
        for id_, fields in await self._open(policy):
            step = int(id_.partition(b"-")[0])
            if step not in apart and (step in arrived or sizes is None or is_shadow):
                continue
            batch = next((batch for _, batch in read_entries(BatchEntry, [(id_, fields)])), None)
            unfit = step in apart or batch is None or batch.n != (sizes and sizes.batch_size)
            if not unfit and batch and sizes and batch.tok - batch.n < sizes.max_token_len:
                continue  # no sequence of it can be too long
            gids = fields.get(b"gids", b"").decode(errors="replace").split()
            entries = await self._entries(gids, sizes)
            if unfit or any(len(entry) == REASON for entry in entries):
                steps.append(step)
                for gid, entry in zip(gids, entries, strict=True):
                    groups += [step, gid, msgspec.json.encode(entry)]
        return steps, groups

    async def _open(self, policy: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Batches that `policy` has not trained yet, as they are kept; if it does not read (yet), all."""
        batches, found = self._view.keys.batches, []
        try:
            readers = await self._view.redis.xinfo_groups(batches)
            pending = await self._view.redis.xpending_range(batches, policy, "-", "+", MOST_OPEN)
            last = next(reader["last-delivered-id"] for reader in readers if reader["name"] == policy.encode())
        except ResponseError:  # no batch was ever formed, or nobody reads
            return [*await self._view.redis.xrange(batches)]
        for lent in pending:
            found += await self._view.redis.xrange(batches, lent["message_id"], lent["message_id"])
        return [*found, *await self._view.redis.xrange(batches, b"(" + last)]

    async def _arrived(self, policy: str) -> set[int]:
        """Steps that HTTP trainers have received whole, and acknowledge with their next call."""
        prefix, steps = f"sent:{policy}:".encode(), set()
        for field, raw in (await self._view.redis.hgetall(self._view.keys.state)).items():
            if field.startswith(prefix) and (sent := read_json(_Sent, raw)) and sent.whole:
                steps.add(sent.step)
        return steps

    # -- groups ---------------------------------------------------------------------------------------------------

    async def _queued(self, sizes: Sizes) -> list[bytes | str]:
        """(entry id, reason, detail), in a row, of the queued groups that can't be trained."""
        unfit, start = [], b"-"  # type: list[bytes | str], bytes
        while found := await self._view.redis.xrange(self._view.keys.groups, start, count=SLICE):
            for id_, entry in read_entries(GroupEntry, found):
                longest = entry.longest
                if not longest and entry.tok - entry.n >= sizes.max_token_len:  # it may be too long
                    [fields] = await self._entries([entry.gid], None)
                    if len(fields) == REASON:
                        unfit += [id_, *fields]
                        continue
                    longest = int(fields[fields.index("longest") + 1])
                if why := sizes.why_not(entry.n, longest):
                    unfit += [id_, OVERSIZED, why]
            start = b"(" + found[-1][0]
        return unfit

    async def _entries(self, gids: Sequence[str], sizes: Sizes | None) -> list[list[str]]:
        """Of each group its queue entry, as fields and values; or, where it can't be queued, the reason and a detail."""
        entries: list[list[str]] = []
        for start in range(0, len(gids), BLOBS):
            part = gids[start : start + BLOBS]
            blobs = await self._view.redis.mget([self._view.keys.blob(gid) for gid in part])
            entries += [_entry(gid, blob, sizes) for gid, blob in zip(part, blobs, strict=True)]
        return entries


def _entry(gid: str, blob: bytes | None, sizes: Sizes | None) -> list[str]:
    if blob is None:
        return [LOST, "its data is gone"]
    try:
        group = from_blob(blob)
        group.gid = gid
        admit(group)
        entry = queue_entry(group, len(blob))
    except ValueError as error:
        return [UNREADABLE, f"its data: {error}"[:SHOWN]]
    if why := sizes.why_not(entry.n, entry.longest) if sizes else "":
        return [OVERSIZED, why]
    return flat_entry(entry)

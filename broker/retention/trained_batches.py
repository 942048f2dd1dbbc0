"""How long trained batches stay: until every reader covers them, and then for as long as `keep_bytes` has room.

A reader is a consumer group on `batches`: each policy is one, and so is the archiver while a run is archived. It marks
the newest step it no longer needs (`covered:<reader>`); what all have marked may be freed, oldest first.
"""

from __future__ import annotations

from typing import Literal, cast

from msgspec import Struct
from redis.exceptions import ResponseError

from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.entries import read_entries, read_json, read_number
from lachesis.broker.records.registrations import ArchiverStatus
from lachesis.broker.records.steps import BatchEntry
from lachesis.broker.retention.shadows import Shadows
from lachesis.broker.run_view import RunView
from lachesis.broker.store.redis_errors import trouble

ARCHIVER = "archiver"  # field of the hash `state`: its heartbeat
SLICE = 16  # batches looked at in one reply


class Kept(Struct, frozen=True):
    """The formed batches that were not freed, and what the run is to keep of those that nobody needs."""

    batches: int
    bytes: int
    first: int  # steps; 0 where there are none
    last: int
    keep_bytes: int
    covered: dict[str, int]  # newest step that each reader no longer needs


class Retention:
    def __init__(self, view: RunView, shadows: Shadows) -> None:
        self._view, self._shadows = view, shadows

    async def keep(self, keep_bytes: int) -> None:
        """From now on keep trained batches while all kept ones take at most so many bytes; 0: free them at once."""
        await self._view.scripts.set_fields(keys=[self._view.keys.settings], args=["keep_bytes", keep_bytes])

    async def advance_checkpoint(self, reader: str, step: int) -> bool:
        """Mark that `reader` no longer needs batches up to `step`. False if there is no such reader (any more)."""
        keys = [self._view.keys.batches, self._view.keys.state]
        return bool(await self._view.scripts.advance_checkpoint(keys=keys, args=[reader, step]))

    async def leave(self, reader: str, *fields: str) -> bool:
        """Keep nothing for `reader` any more, and drop its `fields` of the state. False if there was no such reader."""
        keys = [self._view.keys.batches, self._view.keys.state, self._view.keys.settings]
        return bool(await self._view.scripts.leave(keys=keys, args=[reader, *fields]))

    async def readers(self) -> dict[str, int]:
        """The newest step that each reader no longer needs."""
        try:
            names = [group["name"].decode() for group in await self._view.redis.xinfo_groups(self._view.keys.batches)]
        except ResponseError as error:  # nobody ever subscribed
            if trouble(error):
                raise
            return {}
        if not names:
            return {}
        marks = await self._view.redis.hmget(self._view.keys.state, [f"covered:{name}" for name in names])
        return {name: read_number(mark) for name, mark in zip(names, marks, strict=True)}

    async def archiver(self) -> ArchiverStatus | None:
        """The last heartbeat of the run's archiver; None if the run is not archived."""
        raw = await self._view.redis.hget(self._view.keys.state, ARCHIVER)
        return read_json(ArchiverStatus, raw)

    async def free(self) -> int:
        """Free what no reader needs and `keep_bytes` has no room for, oldest first. Returns the number of batches."""
        marks, rules = await self.readers(), await self._shadows.rules()
        lossy = {name for name, rule in rules.items() if rule.kind == "lossy"}
        strict = {name: step for name, step in marks.items() if name not in lossy}
        limit, freed, start = min((strict or marks).values(), default=0), 0, "-"
        names = self._view.keys
        while found := await self._view.redis.xrange(names.batches, start, f"{limit}-0", count=SLICE):
            for _, batch in read_entries(BatchEntry, found):
                reply = await _retire(self._view, batch)
                if reply == "kept":
                    return freed
                freed += reply == "freed"
                failpoint("retired", batch.step)
            start = f"({found[-1][0].decode()}"  # a lossy shadow may want a few, and none after them
        return freed

    async def kept(self) -> Kept:
        async with self._view.redis.pipeline(transaction=False) as pipe:
            pipe.xlen(self._view.keys.batches)
            pipe.xrange(self._view.keys.batches, count=1)
            pipe.xrevrange(self._view.keys.batches, count=1)
            pipe.hget(self._view.keys.state, "kept_bytes")
            pipe.hget(self._view.keys.settings, "keep_bytes")
            length, first, last, kept, keep = await pipe.execute()
        return Kept(
            batches=length,
            bytes=read_number(kept),
            first=_step(first),
            last=_step(last),
            keep_bytes=read_number(keep),
            covered=await self.readers(),
        )


async def _retire(view: RunView, batch: BatchEntry) -> Literal["freed", "gone", "wanted", "kept"]:
    """retire.lua."""
    keys = view.keys
    reply = await view.scripts.retire(
        keys=[
            *(keys.batches, keys.state, keys.settings, keys.skipped, keys.trained),
            *(keys.blob(gid) for gid in batch.gids),
        ],
        args=[batch.step],
    )
    return cast('Literal["freed", "gone", "wanted", "kept"]', reply.decode())


def _step(found: list[tuple[bytes, dict[bytes, bytes]]]) -> int:
    return int(found[0][0].split(b"-")[0]) if found else 0

"""The groups themselves, as they are stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from lachesis.broker.records.blobs import from_blob
from lachesis.broker.records.groups import Group
from lachesis.broker.run_view import RunView

SLICE_BYTES = 8 << 20  # blobs are fetched in replies of at most this size, or one by one
SLICE_GROUPS = 10_000  # and of so many


class Blobs:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def lacks(self, gids: Sequence[str]) -> bool:
        """Whether the data of one of these groups is gone."""
        for start in range(0, len(gids), 1000):
            part = [self._view.keys.blob(gid) for gid in gids[start : start + 1000]]
            if await self._view.redis.exists(*part) < len(part):
                return True
        return False

    async def fetch(self, gids: Sequence[str]) -> list[Group]:
        """The groups themselves, in order. Raises LookupError naming a missing one."""
        return [from_blob(blob) for blob in await self(gids)]

    async def __call__(self, gids: Sequence[str]) -> list[bytes]:
        """The groups as they are stored, in order: `packing.from_blob` reads one. The same LookupError."""
        blobs: list[bytes] = []
        async for part in self._slices(gids):
            found = await self._view.redis.mget([self._view.keys.blob(gid) for gid in part])
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
            lengths = await self._view.scripts.lengths(keys=[self._view.keys.blob(gid) for gid in part])
            for place, length in enumerate(lengths):
                if size and size + length > SLICE_BYTES:
                    yield part[first:place]
                    first, size = place, 0
                size += length
            yield part[first:]

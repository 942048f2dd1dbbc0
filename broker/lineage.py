"""From the front door to the shim: which versions produced a finished generation.

Keyed by a hash of the whole sequence (prompt and output ids), which is what an environment posts later.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lachesis.broker.connection import Redis
from lachesis.broker.keys import Keys
from lachesis.broker.records import Lineage

TTL_S = 3600


class LineageStore:
    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._keys = redis, keys

    async def record(self, lineages: Sequence[tuple[str, Lineage]]) -> None:
        """Remember (digest, lineage) pairs for an hour; repeating is harmless."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for digest, lineage in lineages:
                pipe.set(self._keys.lineage(digest), msgspec.json.encode(lineage), ex=TTL_S)
            await pipe.execute()

    async def look_up(self, digests: Sequence[str]) -> list[Lineage | None]:
        if not digests:
            return []
        found = await self._redis.mget([self._keys.lineage(digest) for digest in digests])
        return [msgspec.json.decode(raw, type=Lineage) if raw else None for raw in found]

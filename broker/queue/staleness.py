"""The last guard against stale groups: what lies more than `max_lag` versions behind is not made part of a batch.

`max_lag` and the policy it is about come with the groups (PUT keeps the newest), so that whoever forms a batch, a shim
or a trainer, applies the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from lachesis.broker.records.entries import read_number
from lachesis.broker.records.keys import Keys
from lachesis.broker.store.connection import Redis
from lachesis.broker.store.scripts import Scripts


class Staleness:
    def __init__(self, redis: Redis, scripts: Scripts, keys: Keys) -> None:
        self._redis, self._scripts, self._keys = redis, scripts, keys

    async def rule(self) -> tuple[int, int]:
        """(max_lag, newest version of the policy it is about); max_lag 0: groups of any age are trained."""
        max_lag, policy = await self._redis.hmget(self._keys.state, ["max_lag", "lag_of"])
        if not read_number(max_lag):
            return 0, 0
        newest = await self._redis.xrevrange(self._keys.weights(policy.decode()), count=1)
        return read_number(max_lag), int(newest[0][0].split(b"-")[0]) if newest else 0

    async def drop(self, queued: Sequence[tuple[bytes, int]]) -> int:
        """Make dead letters of the stale ones among queued groups, (entry id, v_min) each. Returns how many were stale."""
        max_lag, newest = await self.rule()
        stale = [id_ for id_, v_min in queued if 0 < max_lag < newest - v_min]
        if stale:
            keys = [self._keys.groups, self._keys.dead, self._keys.state]
            await self._scripts.drop(keys=keys, args=[newest, max_lag, *stale])
        return len(stale)

"""Back-pressure: while the queue is over its quota, posts wait. They are not refused.

An Atropos environment drops a group at once on a 4xx and after three quick tries on a 5xx, but waits up to 300 s for
an answer. So slowness is the one signal that loses nothing. Posts wait before their body is read, so that what waits
lies in the senders' memory and not here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from redis.exceptions import OutOfMemoryError
from starlette.exceptions import HTTPException

from lachesis.broker import Broker

HOLD_S = 240.0
LOOK_EVERY_S = 0.25


class Hold:
    """How long one post may wait, from its creation on."""

    def __init__(self, broker: Broker, quota: int, draining: Callable[[], bool], hold_s: float = HOLD_S) -> None:
        self.quota = quota
        self._broker, self._draining, self._hold_s = broker, draining, hold_s
        self._until = asyncio.get_running_loop().time() + hold_s

    async def room(self) -> None:
        """Return when the queue is below its quota; HTTPException 503 where that takes too long."""
        while self.quota and await self._queued_bytes() >= self.quota:
            await self._wait("the queue is over its quota")

    async def store(self, put: Callable[[], Awaitable[str]]) -> str:
        """What `put` replies, called again for as long as it finds the queue, or Redis, full."""
        while True:
            try:
                reply = await put()
            except OutOfMemoryError:
                await self._wait("Redis is full")
                continue
            if reply != "full":
                return reply
            await self._wait("the queue is over its quota")

    async def _queued_bytes(self) -> int:
        return int(await self._broker.redis.hget(self._broker.keys.state, "bytes") or 0)

    async def _wait(self, why: str) -> None:
        if self._draining():
            raise HTTPException(503, f"{why}, and this process is stopping", headers={"Retry-After": "1"})
        if asyncio.get_running_loop().time() > self._until:
            raise HTTPException(
                503, f"{why} for {self._hold_s:.0f} s: is a trainer running?", headers={"Retry-After": "10"}
            )
        await asyncio.sleep(LOOK_EVERY_S)

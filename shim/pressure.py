"""Back-pressure: while too much waits, posts wait. They are not refused.

An Atropos environment drops a group at once on a 4xx and after three quick tries on a 5xx, but waits up to 300 s for
an answer. So slowness is the one signal that loses nothing. Posts wait before their body is read, so that what waits
lies in the senders' memory and not here; only whose group it is, and with it a quota of one environment, is known no
sooner than after.

Nothing waits for a trainer that has nothing to take: while no batch can be made of what is queued, the next group may
be just the one that is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lachesis.broker import Broker
from lachesis.broker.connection import patience
from lachesis.broker.records import Limits
from lachesis.broker.redis_errors import describe, trouble

HOLD_S = 240.0
LOOK_EVERY_S = 0.25
QUICK_S = 0.5  # for which a group is sent again at once where a connection is lost

WHY = {  # by what PUT replies
    "late": "a group that came now would be trained more than max_lag steps late",
    "full": "the queue is over its quota",
    "env_full": "the environment is over its quota of the queue",
}


class Patient:
    """ASGI middleware of a route that posts: all that it asks of Redis waits as long as a post may wait."""

    def __init__(self, app: ASGIApp, draining: Callable[[], bool], hold_s: float) -> None:
        self._app, self._draining, self._hold_s = app, draining, hold_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with patience(self._hold_s, unless=self._draining, forbidden=True):
            await self._app(scope, receive, send)


class Hold:
    """How long one post may wait, from its creation on."""

    def __init__(self, broker: Broker, limits: Limits, draining: Callable[[], bool], hold_s: float = HOLD_S) -> None:
        self._broker, self._limits, self._draining, self._hold_s = broker, limits, draining, hold_s
        self._until = asyncio.get_running_loop().time() + hold_s

    async def room(self) -> None:
        """Return when Redis takes writes and the queue is below its limits; HTTPException 503 where that takes too long."""
        while self._broker.refuses and not await self._broker.takes_writes():
            await self._wait("Redis takes no writes")
        while (why := await self._over()) and await self._batch_waits():
            await self._wait(why)

    async def store(self, put: Callable[[Limits], Awaitable[str]]) -> str:
        """What `put`, given its limits, replies; called again for as long as it finds no room, or Redis refuses."""
        limits = self._limits
        while True:
            try:
                with patience(QUICK_S):
                    reply = await put(limits)
            except RedisError as error:
                if trouble(error) is None:
                    raise
                await self._wait(describe(error))
                while not await self._broker.takes_writes():  # the group is sent again only then
                    await self._wait(describe(error))
                continue
            if reply not in WHY:
                return reply
            if await self._batch_waits():
                await self._wait(WHY[reply])
            else:
                limits = Limits(policy=limits.policy)

    async def _over(self) -> str:
        """Which limit the queue as a whole has reached, in words; empty if none. PUT looks again, and exactly."""
        limits = self._limits
        if not (limits.bytes or limits.sequences or limits.max_lag):
            return ""
        redis, keys = self._broker.redis, self._broker.keys
        held = await redis.hmget(keys.state, ["bytes", "sequences", "formed", "delivered"])
        stored, sequences, formed, delivered = (int(value or 0) for value in held)
        if 0 < limits.bytes <= stored or 0 < limits.sequences <= sequences:
            return WHY["full"]
        if limits.max_lag and (config := await self._broker.parties.trainer_config()):
            waiting = sequences + (formed - delivered) * config.batch_size
            return WHY["late"] if waiting >= limits.max_lag * config.batch_size else ""
        return ""

    async def _batch_waits(self) -> bool:
        """Whether a trainer would get a batch now; yes where none has registered and nobody knows."""
        config = await self._broker.parties.trainer_config()
        return config is None or await self._broker.queue.batch_waits(config.batch_size)

    async def _wait(self, why: str) -> None:
        if self._draining():
            raise HTTPException(503, f"{why}, and this process is stopping", headers={"Retry-After": "1"})
        if asyncio.get_running_loop().time() > self._until:
            raise HTTPException(
                503, f"{why} for {self._hold_s:.0f} s: is a trainer running?", headers={"Retry-After": "10"}
            )
        await asyncio.sleep(LOOK_EVERY_S)

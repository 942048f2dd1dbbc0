"""Back-pressure: while too much waits, posts wait. They are not refused.

An Atropos environment drops a group at once on a 4xx and after three quick tries on a 5xx, but waits up to 300 s for
an answer. So slowness is the one signal that loses nothing. Posts wait before their body is read, so that what waits
lies in the senders' memory and not here; only whose group it is, and with it a quota of one environment, is known no
sooner than after.

Nothing waits for a trainer that has nothing to take: while no batch can be made of what is queued, the next group may
be just the one that is missing.

The posts of a run that wait here wait together: one task looks at the run's counters, and lets those try again, oldest
first, that have room. PUT decides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lachesis.broker import Broker
from lachesis.broker.queue.counters import makes_batch, read_status
from lachesis.broker.records.entries import read_json, read_number
from lachesis.broker.records.groups import Limits
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.store.connection import patience
from lachesis.broker.store.redis_errors import Trouble, describe, trouble
from lachesis.shim.intake.room import UNREAD, WHY, Room, Size

HOLD_S = 240.0
LOOK_EVERY_S = 0.05
QUICK_S = 0.5  # for which a group is sent again at once where a connection is lost


@dataclass(frozen=True)
class Deadline:
    """Until when a post may wait."""

    since: float  # when it came, by the event loop's clock
    hold_s: float
    waits: int = 0  # that it has had


@dataclass(eq=False)
class _Waiter:
    """A post that waits; `go` is set when it may try again, or raises what it is to be answered with."""

    deadline: Deadline
    size: Size
    why: str
    trouble: Trouble | None  # with Redis, where that is what it waits for
    go: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Backpressure:
    """What the posts of one run wait for, and those that wait."""

    def __init__(
        self, broker: Broker, limits: Limits, draining: Callable[[], bool] = lambda: False, hold_s: float = HOLD_S
    ) -> None:
        self.broker, self.limits, self._draining, self.hold_s = broker, limits, draining, hold_s
        self._waiting: set[_Waiter] = set()
        self._watch: asyncio.Task[None] | None = None
        self._stored = asyncio.Event()  # a group that had waited

    def __len__(self) -> int:
        """How many posts wait."""
        return len(self._waiting)

    async def over(self) -> str:
        """Which limit the queue as a whole has reached, in words; empty if none."""
        limits, redis, keys = self.limits, self.broker.redis, self.broker.keys
        if not (limits.bytes or limits.sequences or limits.max_lag):
            return ""
        held = await redis.hmget(keys.state, ["bytes", "sequences", "formed", "delivered"])
        config = await redis.hget(keys.trainers, "config") if limits.max_lag else None
        stored, sequences, formed, delivered = map(read_number, held)
        counters = Counter(bytes=stored, sequences=sequences, undelivered=formed - delivered)
        return Room(limits, counters, _batch_size(config)).refusal(UNREAD)

    async def look(self) -> Room:
        """The run's counters now, in one trip."""
        keys = self.broker.keys
        async with self.broker.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.state)
            pipe.hget(keys.trainers, "config")
            state, raw = await pipe.execute()
        status = read_status(state)
        batch_size = _batch_size(raw)
        names = (b"bytes", b"sequences", b"groups")
        counters = Counter({name.decode(): read_number(state.get(name)) for name in names})
        counters["undelivered"] = status.formed - status.delivered
        counters.update({
            name.decode(errors="replace"): read_number(value)
            for name, value in state.items()
            if name.startswith((b"env_bytes:", b"env_sequences:"))
        })  # fmt: skip
        return Room(self.limits, counters, batch_size, bool(raw) and not makes_batch(status, batch_size))

    def deadline(self) -> Deadline:
        """That of a post which comes now."""
        return Deadline(asyncio.get_running_loop().time(), self.hold_s)

    async def until_room(self, deadline: Deadline) -> Deadline:
        """Return when Redis takes writes and the queue is below its limits; the deadline then says how often that took a wait.

        HTTPException 503 where it takes too long.
        """
        while self.broker.refuses and not await self.broker.takes_writes():
            deadline = await self._wait(deadline, UNREAD, "Redis takes no writes", Trouble.UNREADY)
        if (why := await self.over()) and not (await self.look()).starves:
            deadline = await self._wait(deadline, UNREAD, why)
        return deadline

    async def until_stored(
        self, deadline: Deadline, put: Callable[..., Awaitable[str]], size: Callable[[], Size] = lambda: UNREAD
    ) -> str:
        """What `put(limits=…)` replies; called again for as long as it finds no room, or Redis refuses.

        `size` is asked for when the group has to wait. HTTPException 503 where that takes too long.
        """
        limits = self.limits
        while True:
            try:
                with patience(QUICK_S):
                    reply = await put(limits=limits)
            except RedisError as error:
                if (kind := trouble(error)) is None:
                    raise
                deadline = await self._wait(deadline, size(), describe(error), kind)
                continue
            if reply not in WHY:
                if deadline.waits:  # what waits for the next look may be let go sooner
                    self._stored.set()
                return reply
            if (await self.look()).starves:
                limits = Limits(policy=limits.policy)
            else:
                deadline = await self._wait(deadline, size(), WHY[reply])

    async def _wait(self, deadline: Deadline, size: Size, why: str, kind: Trouble | None = None) -> Deadline:
        """Return when the post may try (again), its deadline with this wait. HTTPException 503 if it is over before."""
        deadline = replace(deadline, waits=deadline.waits + 1)
        waiter = _Waiter(deadline, size, why, kind)
        self._waiting.add(waiter)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._let_go())
        try:
            async with asyncio.timeout_at(deadline.since + deadline.hold_s):
                await waiter.go
        except TimeoutError:
            raise HTTPException(
                503, f"{why} for {deadline.hold_s:.0f} s: is a trainer running?", headers={"Retry-After": "10"}
            ) from None
        finally:
            self._waiting.discard(waiter)
            if not self._waiting and self._watch:
                self._watch.cancel()
                self._watch = None
        return deadline

    async def _let_go(self) -> None:
        """Look again and again while posts wait; the first time a little later, they have just looked themselves."""
        while self._waiting:
            self._stored.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._stored.wait()
            if self._draining():
                self._answer(None)
                return
            try:
                writes = not any(waiter.trouble for waiter in self._waiting) or await self.broker.takes_writes()
                with patience(QUICK_S):
                    room = await self.look()
            except Exception as error:
                if trouble(error):
                    continue  # they wait for that, too
                self._answer(error)
                return
            for waiter in self._admitted(room, writes):
                self._waiting.discard(waiter)
                if not waiter.go.done():
                    waiter.go.set_result(None)

    def _admitted(self, room: Room, writes: bool) -> list[_Waiter]:
        """Those that may try, oldest first; none that Redis refused while it takes no `writes`.

        Where no counter says how many have room, one: what becomes of it shows.
        """
        able = (waiter for waiter in self._waiting if writes or not waiter.trouble)
        waiting = sorted(able, key=lambda waiter: waiter.deadline.since)
        if room.starves:
            return waiting[:1]
        refused = [waiter for waiter in waiting if waiter.trouble is Trouble.FULL]
        probe = min(
            refused, key=lambda waiter: waiter.deadline.waits, default=None
        )  # another one next time: it may be smaller
        admitted = []
        for waiter in waiting:
            if (waiter is probe or waiter.trouble is not Trouble.FULL) and not room.refusal(waiter.size):
                room.admit(waiter.size)
                admitted.append(waiter)
        return admitted

    def _answer(self, error: Exception | None) -> None:
        """End the wait of all: with what Redis answered, or because this process is stopping."""
        for waiter in self._waiting:
            stopping = HTTPException(503, f"{waiter.why}, and this process is stopping", headers={"Retry-After": "1"})
            if not waiter.go.done():
                waiter.go.set_exception(error or stopping)


class Patient:
    """ASGI middleware of a route that posts: all that it asks of Redis waits as long as a post may wait."""

    def __init__(self, app: ASGIApp, draining: Callable[[], bool], hold_s: float) -> None:
        self._app, self._draining, self._hold_s = app, draining, hold_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with patience(self._hold_s, unless=self._draining, forbidden=True):
            await self._app(scope, receive, send)


def _batch_size(registration: bytes | None) -> int:
    config = read_json(TrainerConfig, registration)
    return config.batch_size if config else 0

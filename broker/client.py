"""The broker: one run's view of Redis, for asyncio code and, through `BlockingBroker`, for everything else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import anyio.from_thread
from anyio.from_thread import BlockingPortal
from redis.exceptions import ResponseError

from lachesis.broker.connection import check_server, open_redis
from lachesis.broker.journal import Journal
from lachesis.broker.keys import Keys
from lachesis.broker.lineage import LineageStore
from lachesis.broker.lua import Scripts
from lachesis.broker.parties import Parties
from lachesis.broker.queue import Queue
from lachesis.broker.weights import Weights

P = ParamSpec("P")
T = TypeVar("T")

RESET_SLICE = 1000


class Broker:
    """Everything a room may do with one run, by concern: `queue`, `weights`, `parties`, `lineage`, `journal`."""

    def __init__(self, url: str, run: str = "default") -> None:
        self.url, self.keys = url, Keys(run)
        self.redis = open_redis(url)
        self._blocking = open_redis(url, blocking_reads=True)
        self.scripts = Scripts(self.redis)
        self.queue = Queue(self.redis, self._blocking, self.scripts, self.keys)
        self.weights = Weights(self.redis, self._blocking, self.keys)
        self.parties = Parties(self.redis, self.scripts, self.keys)
        self.lineage = LineageStore(self.redis, self.keys)
        self.journal = Journal(self.redis, self._blocking, self.keys)

    @classmethod
    async def connect(cls, url: str, run: str = "default") -> Broker:
        """Connect, and refuse a server that is unreachable, too old, or may evict data."""
        await check_server(url)
        return cls(url, run)

    async def aclose(self) -> None:
        for redis in (self.redis, self._blocking):
            await redis.aclose()

    async def ping(self) -> bool:
        return bool(await self.redis.ping())

    async def forget(self) -> None:
        """Delete every key of the run, weights and logs included."""
        pattern = self.keys.groups.removesuffix("groups") + "*"
        found = [key async for key in self.redis.scan_iter(match=pattern, count=RESET_SLICE)]
        for start in range(0, len(found), RESET_SLICE):
            await self.redis.unlink(*found[start : start + RESET_SLICE])

    async def reset(self) -> None:
        """Forget the run's queue, batches, ledgers and registrations; weights and logs stay.

        What was posted before may be posted again.
        """
        try:
            readers = await self.redis.xinfo_groups(self.keys.batches)
        except ResponseError:  # no batch was ever formed
            readers = []
        policies = [reader["name"].decode() for reader in readers]
        gids = {entry.gid for _, entry in await self.queue.queued()}
        gids.update(gid for batch in await self.queue.batches() for gid in batch.gids)
        for policy in policies:
            gids.update([gid async for entry in self.queue.ledger(policy) for gid in entry.gids])
        groups = [key for gid in gids for key in (self.keys.blob(gid), self.keys.seen(gid))]
        for start in range(0, len(groups), RESET_SLICE):
            await self.scripts.reset(keys=groups[start : start + RESET_SLICE])
        named = [self.keys.groups, self.keys.batches, self.keys.state, self.keys.envs, self.keys.trainers]
        await self.scripts.reset(keys=[*named, *map(self.keys.ledger, policies)])


class BlockingBroker:
    """The same broker for code without an event loop: `blocking.call(blocking.broker.queue.fetch, gids)`.

    The loop runs in a thread of its own, which is also where heartbeats live, so a long step does not starve them.
    """

    def __init__(self, broker: Broker, portal: BlockingPortal) -> None:
        self.broker, self.portal = broker, portal

    def call(self, operation: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one operation of the broker and wait for its result."""

        async def run() -> T:
            return await operation(*args, **kwargs)

        return self.portal.call(run)


@contextmanager
def connect_blocking(url: str, run: str = "default") -> Iterator[BlockingBroker]:
    """Connect from blocking code; raises what `Broker.connect` raises."""
    with anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": True}) as portal:
        broker = portal.call(Broker.connect, url, run)
        try:
            yield BlockingBroker(broker, portal)
        finally:
            portal.call(broker.aclose)

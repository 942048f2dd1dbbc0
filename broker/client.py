"""The broker: one run's view of Redis, for asyncio code and, through `BlockingBroker`, for everything else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import anyio.from_thread
from anyio.from_thread import BlockingPortal
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from lachesis.broker.queue.queue import Queue
from lachesis.broker.records.keys import Keys
from lachesis.broker.replicas.members import Members
from lachesis.broker.retention.dead_letters import DeadLetters
from lachesis.broker.run.journal import Journal
from lachesis.broker.run.lineage import LineageStore
from lachesis.broker.run.registry import Registry
from lachesis.broker.run.runs import Runs
from lachesis.broker.run.tokens import Tokens
from lachesis.broker.run_view import RunView
from lachesis.broker.store.connection import HEARTBEATS, open_redis, patience, reconnect
from lachesis.broker.store.multiplexed import MultiplexedConnection
from lachesis.broker.store.redis_errors import trouble
from lachesis.broker.store.scripts import Scripts
from lachesis.broker.store.server import check_server
from lachesis.broker.weights.checkpoints import CheckpointDigests
from lachesis.broker.weights.pools import Pools
from lachesis.broker.weights.versions import Weights

P = ParamSpec("P")
T = TypeVar("T")

ASK_S = 1.0
LEAVE_EVERY_S = 0.1  # commands that are refused together make connections anew once


class Connections:
    """What the views of all runs on one Redis share.

    The scripts, a pool each for commands, blocking reads and heartbeats, and a wire for what every posted group needs.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.commands, self.blocking = open_redis(url, leave=self.leave), open_redis(url, leave=self.leave)
        self.heartbeats = open_redis(url, connections=HEARTBEATS, leave=self.leave)
        self.multiplexed = MultiplexedConnection(self.commands)
        self._left_at = float("-inf")
        self.scripts = Scripts(self.commands, self.multiplexed)

    def view(self, run: str) -> RunView:
        """Of one run. Raises ConfigurationError for an impossible name."""
        return RunView(self.commands, self.blocking, self.heartbeats, self.multiplexed, self.scripts, Keys(run))

    async def leave(self) -> None:
        """Make all connections anew: their server is the master no more, and the address may lead to the one that is."""
        if time.monotonic() - self._left_at < LEAVE_EVERY_S:  # who is told so now is told of those before
            return
        self._left_at = time.monotonic()
        self.multiplexed.drop(RedisConnectionError("the server was demoted"))
        for connections in (self.commands, self.blocking, self.heartbeats):
            await reconnect(connections)

    async def aclose(self) -> None:
        for connections in (self.multiplexed, self.commands, self.blocking, self.heartbeats):
            await connections.aclose()


class Broker:
    """Everything a room may do with one run, by concern.

    `queue`, `members`, `dead`, `weights`, `checkpoints`, `pools`, `registry`, `lineage`, `journal`, `tokens`.
    """

    def __init__(self, connections: Connections, run: str = "default") -> None:
        self.connections = connections
        self.view = view = connections.view(run)
        self.url, self.keys, self.redis, self.scripts = connections.url, view.keys, view.redis, view.scripts
        self.queue = Queue(view)
        self.dead = DeadLetters(view)
        self.weights = Weights(view)
        self.checkpoints = CheckpointDigests(view)
        self.pools = Pools(view)
        self.members = Members(view)
        self.registry = Registry(view)
        self.lineage = LineageStore(view)
        self.journal = Journal(view)
        self.tokens = Tokens(view)
        self._runs = Runs(view)
        self.runs, self.known_runs, self.exists = self._runs.enlisted, self._runs.known, self._runs.exists
        self.enlist, self.forget = self._runs.enlist, self._runs.forget
        self.refuses = False  # writes, when `takes_writes` was asked last
        self._asking: asyncio.Task[bool] | None = None

    @classmethod
    async def connect(cls, url: str, run: str = "default") -> Broker:
        """Connect, and refuse a server that is unreachable, too old, or may evict data."""
        await check_server(url)
        return cls(Connections(url), run)

    def for_run(self, run: str) -> Broker:
        """The same for another run, over the same connections. Raises ConfigurationError for an impossible name."""
        return Broker(self.connections, run)

    async def aclose(self) -> None:
        """Close the connections, which are those of every view made by `for_run`."""
        await self.connections.aclose()

    async def ping(self) -> bool:
        return bool(await self.redis.ping())

    async def probe(self) -> None:
        """Raise what Redis answers a write that changes nothing."""
        await self.redis.execute_command("SETRANGE", self.keys.blob("probe"), 0, "")

    async def takes_writes(self) -> bool:
        """Whether Redis takes a write, now or within a second. Those who ask meanwhile share the answer."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._takes_writes())
            self._asking.add_done_callback(self._answered)
        self.refuses = not await asyncio.shield(self._asking)
        return not self.refuses

    async def _takes_writes(self) -> bool:
        try:
            with patience(ASK_S, forbidden=True):
                await self.probe()
        except RedisError as error:
            if trouble(error) is None:
                raise
            return False
        return True

    def _answered(self, _: asyncio.Task[bool]) -> None:
        self._asking = None

    async def reset(self) -> None:
        """Forget the run's queue, batches, ledgers, dead letters and registrations; weights, logs, refused posts stay.

        What was posted before may be posted again; what is posted meanwhile is forgotten, or comes after. One script does it.
        """
        await self._runs.reset()
        self.registry.forget_envs()


class BlockingBroker:
    """The same broker for code without an event loop: `blocking.call(blocking.broker.queue.fetch, gids)`.

    The loop runs in a thread of its own, which is also where heartbeats live, so a long step does not starve them.
    """

    def __init__(self, broker: Broker, portal: BlockingPortal) -> None:
        self.broker, self.portal = broker, portal
        self._loop = portal.call(_this_loop)

    def call(self, operation: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one operation of the broker and wait for its result."""

        return self.start(operation, *args, **kwargs).result()

    def start(self, operation: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run one operation of the broker beside what the caller does next."""

        async def run() -> T:
            return await operation(*args, **kwargs)

        running = run()
        try:
            return asyncio.run_coroutine_threadsafe(running, self._loop)  # the portal's own way takes twice as long
        except RuntimeError:  # the broker was closed
            running.close()
            raise


async def _this_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


@contextmanager
def connect_blocking(url: str, run: str = "default") -> Iterator[BlockingBroker]:
    """Connect from blocking code; raises what `Broker.connect` raises."""
    with anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": True}) as portal:
        broker = portal.call(Broker.connect, url, run)
        try:
            yield BlockingBroker(broker, portal)
        finally:
            portal.call(broker.aclose)

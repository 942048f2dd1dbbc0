"""A real Redis brought into each kind of trouble, and out of it; and an address behind which the master changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ports import free_port
from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from lachesis.broker import EmbeddedRedis

CONFIG = ("enable-debug-command yes", "enable-protected-configs yes", "busy-reply-threshold 5")


class SickRedis:
    """Trouble for one server: `async with sick(code):`."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self._server = server
        at_once = Retry(NoBackoff(), 0)
        self._redis = redis_asyncio.Redis(unix_socket_path=str(server.socket), protocol=2, retry=at_once)

    async def aclose(self) -> None:
        await self._redis.aclose()

    @asynccontextmanager
    async def __call__(self, code: str) -> AsyncIterator[None]:
        async with getattr(self, f"_{code.lower()}")():
            yield

    async def _do(self, *command: Any) -> Any:
        return await self._redis.execute_command(*command)

    @asynccontextmanager
    async def _noreplicas(self) -> AsyncIterator[None]:
        await self._do("CONFIG", "SET", "min-replicas-to-write", "1")
        yield
        await self._do("CONFIG", "SET", "min-replicas-to-write", "0")

    @asynccontextmanager
    async def _oom(self) -> AsyncIterator[None]:
        await self._do("CONFIG", "SET", "maxmemory", "1")
        yield
        await self._do("CONFIG", "SET", "maxmemory", "0")

    @asynccontextmanager
    async def _readonly(self) -> AsyncIterator[None]:
        await self._do("REPLICAOF", "127.0.0.1", "1")
        yield
        await self._do("REPLICAOF", "NO", "ONE")

    @asynccontextmanager
    async def _masterdown(self) -> AsyncIterator[None]:
        await self._do("CONFIG", "SET", "replica-serve-stale-data", "no")
        async with self._readonly():
            yield

    @asynccontextmanager
    async def _misconf(self) -> AsyncIterator[None]:
        """Its last snapshot failed, for want of a folder."""
        gone: Path = self._server.folder / "gone"
        gone.mkdir()
        await self._do("CONFIG", "SET", "dir", str(gone))
        gone.rmdir()
        await self._do("CONFIG", "SET", "save", "3600 1000000")
        await self._do("BGSAVE")
        await until(self._refuses_writes)
        yield
        await self._do("CONFIG", "SET", "save", "")
        await self._do("CONFIG", "SET", "dir", str(self._server.folder))

    @asynccontextmanager
    async def _busy(self) -> AsyncIterator[None]:
        """Somebody's script does not end."""
        other = self._waiting()
        script: asyncio.Future[Any] = asyncio.ensure_future(other.eval("while true do end", 0))
        await until(self._refuses_writes)
        yield
        await self._do("SCRIPT", "KILL")
        with contextlib.suppress(ResponseError):
            await script
        await other.aclose()

    @asynccontextmanager
    async def _noperm(self) -> AsyncIterator[None]:
        await self._do("ACL", "SETUSER", "shim", "-@write")
        yield
        await self._do("ACL", "SETUSER", "shim", "+@write")

    @asynccontextmanager
    async def _loading(self) -> AsyncIterator[None]:
        """It reads its file again, and has much of it to read, until it is started anew."""
        await self._do("DEBUG", "POPULATE", 20_000, "filler", 1024)
        await self._do("CONFIG", "SET", "key-load-delay", 10_000)  # microseconds
        await self._do("CONFIG", "SET", "loading-process-events-interval-bytes", 1024)
        await self._do("CONFIG", "SET", "rdbcompression", "no")  # so that it answers after each key
        other = self._waiting()
        reading = asyncio.create_task(other.execute_command("DEBUG", "RELOAD"))
        await until(self._refuses_writes)
        yield
        assert self._server.pid is not None
        os.kill(self._server.pid, signal.SIGKILL)
        with contextlib.suppress(RedisConnectionError):
            await reading
        await other.aclose()
        await until(self._revived)

    async def _revived(self) -> bool:
        return self._server.revive()

    @asynccontextmanager
    async def _clusterdown(self) -> AsyncIterator[None]:
        """Nobody serves one of the slots, which the run has no key in."""
        await self._do("CLUSTER", "DELSLOTS", 0)
        await until(self._refuses_writes)
        yield
        await self._do("CLUSTER", "ADDSLOTS", 0)

    def _waiting(self) -> redis_asyncio.Redis:
        """A client whose one command may take long, and is not sent again."""
        at_once = Retry(NoBackoff(), 0)
        return redis_asyncio.Redis(unix_socket_path=str(self._server.socket), socket_timeout=None, retry=at_once)

    async def _refuses_writes(self) -> bool:
        try:
            await self._do("SETRANGE", "probe", 0, "")
        except (ResponseError, BusyLoadingError):
            return True
        return False

    async def _takes_writes(self) -> bool:
        return not await self._refuses_writes()


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def sick_redis(
    folder: Path, *, cluster: bool = False, user: bool = False
) -> AsyncIterator[tuple[str, SickRedis]]:
    """(URL, what makes it sick) of a server of one's own. `user`: the URL is that of a user whose rights can be taken."""
    ports = (f"port {free_port()}", f"cluster-port {free_port()}", "bind 127.0.0.1")
    more = ("cluster-enabled yes", *ports) if cluster else ()
    with EmbeddedRedis(folder, config=(*CONFIG, *more)) as server:
        sick = SickRedis(server)
        if cluster:
            await sick._do("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await until(sick._takes_writes)
        await sick._do("ACL", "SETUSER", "shim", "on", ">pw", "~*", "+@all")
        yield server.url.replace("unix://", "unix://shim:pw@") if user else server.url, sick
        await sick.aclose()


class Pair:
    """Two servers and one address, as of a load balancer that keeps the connections it has: `async with pair(folder)`."""

    def __init__(self, master: EmbeddedRedis, replica: EmbeddedRedis, ports: tuple[int, int], address: int) -> None:
        self._servers, self._ports = (master, replica), ports
        self.leads_to = 0
        self.url = f"redis://127.0.0.1:{address}/0"
        self.clients = [redis_asyncio.Redis(port=port, protocol=2) for port in ports]

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs = await asyncio.open_connection("127.0.0.1", self._ports[self.leads_to])
        with contextlib.suppress(asyncio.CancelledError):  # at the end of a test that failed
            await asyncio.gather(_pump(reader, theirs[1]), _pump(theirs[0], writer), return_exceptions=True)

    async def demote(self) -> None:
        """The replica becomes the master, with all that was written; the address still leads to the old one, a replica now."""
        await self.clients[0].execute_command("FAILOVER")

        async def demoted() -> bool:
            return (await self.clients[0].info("replication"))["role"] == "slave"

        await until(demoted)

    def switch(self) -> None:
        """New connections lead to the new master; those there are stay with the old one."""
        self.leads_to = 1


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[Pair]:
    ports = free_port(), free_port()
    of = [[f"port {port}", "bind 127.0.0.1", "repl-diskless-sync-delay 0"] for port in ports]
    of[1].append(f"replicaof 127.0.0.1 {ports[0]}")
    with EmbeddedRedis(folder / "a", config=of[0]) as master, EmbeddedRedis(folder / "b", config=of[1]) as replica:
        listener = socket.create_server(("127.0.0.1", 0))
        both = Pair(master, replica, ports, listener.getsockname()[1])

        async def follows() -> bool:
            with contextlib.suppress(RedisConnectionError):
                return (await both.clients[1].info("replication"))["master_link_status"] == "up"
            return False

        await until(follows)
        server = await asyncio.start_server(both.connect, sock=listener)
        yield both
        server.close()
        for client in both.clients:
            await client.aclose()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()

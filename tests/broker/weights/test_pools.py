"""Blocking reads, heartbeats and commands don't get in each other's way, and no wait is longer than was asked for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.exceptions import ConnectionError, RedisError
from scored import group

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.store import connection
from lachesis.broker.store.connection import COMMANDS, open_redis, wait_for_entries

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
STATUS = ServerStatus("s", "main", "http://s", "ready", 0, -1, 0.0)
SOON_S = 20.0  # far below what a trap would cost, far above what a busy machine needs


@pytest.fixture
async def starved(broker: Broker) -> AsyncIterator[Broker]:
    """A broker all of whose connections for commands are taken, as if by slow callers."""
    for number in range(2):
        await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0)
    await broker.queue.subscribe("main")
    pool = broker.redis.connection_pool
    async with AsyncExitStack() as taken:
        for _ in range(COMMANDS):
            taken.push_async_callback(pool.release, await pool.get_connection())
        pool.timeout = 0.05
        with pytest.raises(ConnectionError, match="No connection available"):
            await broker.ping()
        yield broker
        pool.timeout = 20


async def test_heartbeats_go_through_when_commands_wait(starved: Broker, shared_redis: EmbeddedRedis) -> None:
    direct = await Broker.connect(shared_redis.url, starved.keys.run)
    lease = await direct.queue.lease_or_form("main", "r", 4, lapse_s=600)
    assert lease is not None
    lock = starved.registry.writer("main", ttl_s=60)
    async with asyncio.timeout(SOON_S):
        assert await lock.acquire(blocking=False)
        assert await starved.queue.renew("main", lease)
        assert await lock.extend(60, replace_ttl=True)
        await starved.registry.report(STATUS)
        await lock.release()
    assert await direct.registry.servers() == [STATUS]
    await direct.aclose()


async def test_heartbeats_load_their_scripts_themselves(starved: Broker, shared_redis: EmbeddedRedis) -> None:
    redis = open_redis(shared_redis.url)
    await redis.script_flush()
    await redis.aclose()
    async with asyncio.timeout(SOON_S):
        await starved.registry.report(STATUS)


async def test_blocking_readers_leave_commands_and_heartbeats_alone(broker: Broker) -> None:
    readers = [asyncio.create_task(broker.queue.wait_for_group(600, after="0-0")) for _ in range(COMMANDS + 16)]
    pool = broker.connections.blocking.connection_pool
    async with asyncio.timeout(SOON_S):
        while pool.can_get_connection():  # noqa: ASYNC110 — redis-py tells nobody when its pool is empty
            await asyncio.sleep(0.01)
        await broker.registry.report(STATUS)
        assert await broker.queue.put("g1", group(1), v_min=0, v_max=0) == "stored"
        await asyncio.gather(*readers)


async def test_a_wait_longer_than_the_sockets_timeout_ends_on_time(
    shared_redis: EmbeddedRedis, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 0.4)
    monkeypatch.setattr(connection, "BLOCK_S", 0.1)
    broker = await Broker.connect(shared_redis.url, run_name)
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(SOON_S):
        assert await broker.weights.wait_newer("main", -1, 1.2) is None
    assert loop.time() - began >= 1.2
    waiting = asyncio.create_task(broker.queue.wait_for_group(600, after="0-0"))
    await asyncio.sleep(0.6)  # longer than the timeout: several reads one after the other
    await broker.queue.put("g1", group(1), v_min=0, v_max=0)
    async with asyncio.timeout(SOON_S):
        await waiting
    await broker.aclose()


async def test_a_blocking_read_goes_on_after_a_restart(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    waiting = asyncio.create_task(broker.queue.wait_for_group(600, after="0-0"))
    await broker.registry.report(STATUS)
    assert redis_server.pid is not None
    os.kill(redis_server.pid, signal.SIGKILL)
    redis_server.stop()
    redis_server.start()
    await broker.queue.put("g1", group(1), v_min=0, v_max=0)
    async with asyncio.timeout(SOON_S):
        await waiting
    await broker.aclose()


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "hung"])
async def test_a_server_that_is_gone_is_noticed(
    redis_server: EmbeddedRedis, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 0.4)
    monkeypatch.setattr(connection, "BLOCK_S", 0.1)
    redis = open_redis(redis_server.url, patience_s=1.0)
    await redis.ping()
    assert redis_server.pid is not None
    os.kill(redis_server.pid, signal.SIGKILL if killed else signal.SIGSTOP)
    try:
        async with asyncio.timeout(SOON_S):
            with pytest.raises(RedisError):
                await wait_for_entries(redis, "stream", "0-0", 600)
            with pytest.raises(RedisError):
                await redis.ping()
    finally:
        if not killed:
            os.kill(redis_server.pid, signal.SIGCONT)
        await redis.aclose()

"""A Redis that can't do the work is refused at once, in one line that says what to do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis_servers import TOO_OLD, binary
from structlog.testing import capture_logs

from lachesis.broker import (
    Broker,
    ConfigurationError,
    EmbeddedRedis,
    RedisUnreachable,
    RedisUnsuitable,
    connect_blocking,
)
from lachesis.broker.store.connection import hide_password, open_redis
from lachesis.broker.store.scripts import Scripts
from lachesis.broker.store.server import check_server
from lachesis.service.logs import configure_logging

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def test_nobody_answers() -> None:
    with pytest.raises(RedisUnreachable) as error:
        await Broker.connect(f"redis://user:secret@127.0.0.1:{unused_port()}/0")
    assert "secret" not in str(error.value)
    assert "no Redis answers at redis://user:***@127.0.0.1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:notaport"])
async def test_not_a_redis_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match="redis_url = "):
        await Broker.connect(url)


async def test_a_server_that_wants_a_password(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    await broker.redis.config_set("requirepass", "secret")
    await broker.aclose()
    with pytest.raises(RedisUnreachable, match=r"refuses us \(Authentication required\): check user and password"):
        await Broker.connect(redis_server.url)
    with pytest.raises(RedisUnreachable, match=r"refuses us .*: check user and password"):
        await Broker.connect(f"unix://:wrong@{redis_server.socket}")


async def test_a_server_that_may_evict(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    await broker.redis.config_set("maxmemory-policy", "allkeys-lru")
    await broker.aclose()
    with pytest.raises(RedisUnsuitable, match=r"maxmemory-policy allkeys-lru.*set it to noeviction"):
        await Broker.connect(redis_server.url)


async def test_a_server_that_is_too_old(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, server=binary(TOO_OLD)) as server:
        for user in ("", "looker:pw@"):
            redis = open_redis(server.url)
            await redis.execute_command("ACL", "SETUSER", "looker", "on", ">pw", "+info")
            await redis.aclose()
            with pytest.raises(RedisUnsuitable, match=r"^Redis 6\.2\.5 at .* is too old: Lachesis needs Redis 7\.0"):
                await Broker.connect(server.url.replace("unix://", f"unix://{user}"))


async def test_info_is_all_that_our_user_must_be_allowed(redis_server: EmbeddedRedis) -> None:
    full = await check_server(redis_server.url)
    redis = open_redis(redis_server.url)
    await redis.execute_command("ACL", "SETUSER", "looker", "on", ">pw", "+info")
    await redis.aclose()
    seen = await check_server(redis_server.url.replace("unix://", "unix://looker:pw@"))
    assert seen == full
    assert seen.durability == "keeps an append-only file"


async def test_a_server_that_keeps_nothing_is_warned_of(tmp_path: Path) -> None:
    configure_logging("test")
    with EmbeddedRedis(tmp_path, config=["appendonly no"]) as server, capture_logs() as logs:
        broker = await Broker.connect(server.url)
        await broker.aclose()
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [("warning", "Redis is not durable")]
    assert "NO append-only file" in logs[0]["why"]
    assert "set appendonly yes" in logs[0]["why"]


def test_only_the_password_is_hidden() -> None:
    assert hide_password("redis://u:p@h:1/0") == "redis://u:***@h:1/0"
    assert hide_password("redis://h:1/0") == "redis://h:1/0"


def test_blocking_code_has_the_same_broker(shared_redis: EmbeddedRedis, run_name: str) -> None:
    with connect_blocking(shared_redis.url, run_name) as blocking:
        assert blocking.call(blocking.broker.ping)
        assert blocking.call(blocking.broker.queue.status).groups == 0


async def test_a_server_that_forgets_a_script_once_more_is_given_it_once_more(broker: Broker) -> None:
    redis = broker.redis

    class Forgetful:
        """The server restarts between the loading of a script and its call, twice."""

        restarts = 2

        def __getattr__(self, name: str) -> Any:
            return getattr(redis, name)

        async def script_load(self, text: str) -> Any:
            sha = await redis.script_load(text)
            if self.restarts:
                self.restarts -= 1
                await redis.script_flush()
            return sha

    await redis.script_flush()
    note = Scripts(Forgetful(), broker.connections.multiplexed).set_fields
    assert await note(keys=[broker.keys.state], args=["mark", "1"]) == 1


def test_a_connection_that_was_closed_a_moment_ago_is_made_again(shared_redis: EmbeddedRedis) -> None:
    async def ping() -> bool:
        redis = open_redis(shared_redis.url)
        connection = await redis.connection_pool.get_connection()
        closed = [connection._writer.transport]

        class Closing(type(connection)):  # type: ignore[misc]
            async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
                if closed:
                    closed.pop().abort()
                await super().send_packed_command(*args, **kwargs)

        connection.__class__ = Closing
        await redis.connection_pool.release(connection)
        pong = bool(await redis.ping())
        assert not closed
        await redis.aclose()
        return pong

    assert uvloop.run(ping())


async def test_a_server_that_still_loads_its_file_is_not_called_forgetful(tmp_path: Path) -> None:
    configure_logging("test")
    with EmbeddedRedis(tmp_path) as server:
        redis = open_redis(server.url)
        for number in range(5000):
            await redis.incr(f"k{number}")
        await redis.aclose()
    with capture_logs() as logs:
        slow = EmbeddedRedis(
            tmp_path, config=["key-load-delay 400"]
        )  # µs a command: 2 s in all, answering now and then
        loading = asyncio.create_task(asyncio.to_thread(slow.start))
        seen = []
        while not loading.done():
            with contextlib.suppress(RedisUnreachable):
                seen.append(await check_server(slow.url))
        (await loading).stop()
    assert seen
    assert all(server.append_only for server in seen)
    assert logs == []

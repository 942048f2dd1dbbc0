"""A Redis that can't do the work is refused at once, in one line that says what to do."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from lachesis.broker import (
    Broker,
    ConfigurationError,
    EmbeddedRedis,
    RedisUnreachable,
    RedisUnsuitable,
    connect_blocking,
)
from lachesis.broker.connection import check_info, hide_password
from lachesis.broker.lua import Scripts

pytestmark = pytest.mark.anyio


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


@pytest.mark.parametrize(
    ("version", "new_enough"), [("6.2.14", False), ("7.0.15", True), ("7.9.0", True), ("10.0.1", True)]
)
def test_the_oldest_version(version: str, new_enough: bool) -> None:
    info = {"redis_version": version, "maxmemory_policy": "noeviction"}
    if new_enough:
        check_info(info, "here")
    else:
        with pytest.raises(RedisUnsuitable, match=r"Redis at here is version 6\.2\.14; Lachesis needs 7\.0"):
            check_info(info, "here")


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
    note = Scripts(Forgetful()).note
    assert await note(keys=[broker.keys.state], args=["mark", "1"]) == 1

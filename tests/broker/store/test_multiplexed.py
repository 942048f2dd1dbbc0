"""Many callers share one connection: each gets its own replies, whatever becomes of the others and of the connection."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from redis.exceptions import NoScriptError, OutOfMemoryError, ResponseError

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.store import multiplexed
from lachesis.broker.store.connection import open_redis
from lachesis.broker.store.multiplexed import MultiplexedConnection

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture
async def line(broker: Broker) -> AsyncIterator[MultiplexedConnection]:
    shared = MultiplexedConnection(broker.redis)
    yield shared
    await shared.aclose()


async def connections(broker: Broker) -> int:
    return len(await broker.redis.client_list())


async def test_each_caller_gets_its_own_replies_over_one_connection(
    broker: Broker, line: MultiplexedConnection
) -> None:
    await broker.redis.ping()
    before = await connections(broker)
    values = [str(number).encode() * (1 + number % 2 * 50_000) for number in range(100)]
    found = await asyncio.gather(*(line.call(("ECHO", value), ("PING",)) for value in values))
    assert found == [[value, b"PONG"] for value in values]
    assert await connections(broker) == before + 1


async def test_errors_have_types_and_reach_only_their_caller(broker: Broker, line: MultiplexedConnection) -> None:
    key = broker.keys.blob("text")
    found = await asyncio.gather(
        line.call(("SET", key, b"x"), ("EVALSHA", "0" * 40, 0)), line.call(("INCR", key)), line.call(("GET", key)),
        return_exceptions=True,
    )  # fmt: skip
    assert isinstance(found[0], NoScriptError)
    assert type(found[1]) is ResponseError
    assert found[2] == [b"x"]


async def test_who_gives_up_takes_nobody_elses_reply(line: MultiplexedConnection) -> None:
    calls = [asyncio.create_task(line.call(("ECHO", str(number)))) for number in range(20)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert found[1::2] == [[str(number).encode()] for number in range(1, 20, 2)]
    assert await line.call(("ECHO", "after")) == [b"after"]


async def test_a_lost_connection_is_made_again_and_commands_sent_again(
    broker: Broker, line: MultiplexedConnection
) -> None:
    (mine,) = await line.call(("CLIENT", "ID"))
    waiting = asyncio.create_task(line.call(("BLPOP", broker.keys.blob("never"), 1)))
    others = [asyncio.create_task(line.call(("ECHO", str(number)))) for number in range(9)]
    await asyncio.sleep(0.1)
    await broker.redis.client_kill_filter(_id=mine)
    assert await asyncio.gather(*others) == [[str(number).encode()] for number in range(9)]
    assert await waiting == [None]
    assert await line.call(("CLIENT", "ID")) != [mine]


async def test_a_restart_of_the_server_is_a_pause(redis_server: EmbeddedRedis) -> None:
    line = MultiplexedConnection(open_redis(redis_server.url))
    assert await line.call(("SET", "kept", "1")) == [b"OK"]
    assert redis_server.pid is not None
    os.kill(redis_server.pid, signal.SIGKILL)
    redis_server.stop()
    waiting = [asyncio.create_task(line.call(("GET", "kept"))) for _ in range(5)]
    await asyncio.sleep(0.2)
    assert not any(call.done() for call in waiting)
    redis_server.start()
    assert await asyncio.gather(*waiting) == [[b"1"]] * 5
    await line.aclose()


async def test_a_server_that_owes_a_reply_and_is_silent_is_given_up(
    redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplexed, "REPLY_S", 2.0)
    line = MultiplexedConnection(open_redis(redis_server.url))
    (first,) = await line.call(("CLIENT", "ID"))
    await asyncio.sleep(2.5)  # it owes nothing
    assert await line.call(("CLIENT", "ID")) == [first]
    assert redis_server.pid is not None
    os.kill(redis_server.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(line.call(("CLIENT", "ID")))
    await asyncio.sleep(2.5)
    os.kill(redis_server.pid, signal.SIGCONT)
    assert await waiting != [first]
    await line.aclose()


async def test_a_full_server_says_so(redis_server: EmbeddedRedis) -> None:
    redis = open_redis(redis_server.url)
    line = MultiplexedConnection(redis)
    await redis.config_set("maxmemory", "1mb")
    with pytest.raises(OutOfMemoryError):
        await line.call(("SET", "large", bytes(2 << 20)), ("PING",))
    assert await line.call(("PING",)) == [b"PONG"]
    await line.aclose()
    await redis.aclose()

"""Several runs over one set of connections, and the tokens of each."""

from __future__ import annotations

import time
from hashlib import sha256

import pytest
from scored import group

from lachesis.broker import Broker, ConfigurationError, Conflict, EmbeddedRedis
from lachesis.broker.records.registrations import TokenRecord
from lachesis.broker.run.tokens import matching

pytestmark = pytest.mark.anyio


async def test_runs_share_connections_and_nothing_else(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url, "first")
    assert await broker.queue.put("g", group(1), v_min=0, v_max=0) == "stored"
    before = len(await broker.redis.client_list())
    views = [broker.for_run(f"run-{number}") for number in range(40)]
    for view in views:
        assert await view.queue.put("g", group(1), v_min=0, v_max=0) == "stored"
        assert (await view.queue.status()).groups == 1
        await view.reset()
    assert len(await broker.redis.client_list()) == before
    assert (await broker.queue.status()).groups == 1
    with pytest.raises(ConfigurationError, match=r"^run = 'a b': use 1 to 64 letters"):
        broker.for_run("a b")
    await broker.aclose()


async def test_a_run_is_on_the_list_until_it_is_forgotten(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url, "b")
    other = broker.for_run("a")
    await broker.enlist()
    first = await broker.runs()
    await other.enlist()
    await broker.enlist()
    assert list(await broker.runs()) == ["b", "a"]
    assert (await broker.runs())["b"] == first["b"] <= time.time()
    await broker.redis.config_set("maxmemory", 1)
    await broker.for_run("c").enlist()
    await broker.redis.config_set("maxmemory", 0)
    assert list(await broker.runs()) == ["b", "a", "c"]
    token, _ = await broker.tokens.create("trainer")
    await broker.queue.put("g", group(1), v_min=0, v_max=0)
    await broker.forget()
    assert list(await other.runs()) == ["a", "c"]
    assert [key async for key in broker.redis.scan_iter(match="*{b}*")] == [broker.keys.tokens.encode()]
    assert matching(token.encode(), await broker.tokens.all())
    await broker.aclose()


async def test_a_token_is_kept_as_its_hash_and_known_until_revoked(broker: Broker) -> None:
    token, record = await broker.tokens.create("environment", "alice")
    assert record == TokenRecord("alice", "environment", sha256(token.encode()).hexdigest(), record.created_at)
    stored = await broker.redis.hgetall(broker.keys.tokens)
    assert token not in repr(stored)
    second, unnamed = await broker.tokens.create("admin")
    assert unnamed.name.startswith("admin-")
    records = await broker.tokens.all()
    assert records == [record, unnamed]
    assert matching(token.encode(), records) == record
    assert matching(second.encode(), records) == unnamed
    for wrong in (b"", b"x", token[:-1].encode(), record.sha256.encode()):
        assert matching(wrong, records) is None

    revoked = await broker.tokens.revoke("alice")
    assert await broker.tokens.revoke("alice") == revoked
    records = await broker.tokens.all()
    assert records == [revoked, unnamed]
    assert matching(token.encode(), records) is None
    assert matching(second.encode(), records) == unnamed


async def test_names_of_tokens_are_not_reused(broker: Broker) -> None:
    await broker.tokens.create("environment", "alice")
    await broker.tokens.revoke("alice")
    with pytest.raises(Conflict, match="has a token named 'alice' already: choose another --name"):
        await broker.tokens.create("admin", "alice")
    assert [record.role for record in await broker.tokens.all()] == ["environment"]
    with pytest.raises(ConfigurationError, match="no token named 'bob'"):
        await broker.tokens.revoke("bob")
    with pytest.raises(ConfigurationError, match=r"^name = 'a b'"):
        await broker.tokens.create("admin", "a b")

"""Refused posts can't fill Redis: what is kept of them is compressed, cut, counted to the byte, and freed oldest first."""

from __future__ import annotations

import gzip
import random
from typing import Any

import httpx
import pytest
from queued import lease, put
from scored import trained
from trajectories import TRAINER, serving

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.queue import commit
from lachesis.broker.retention import dead_letters
from lachesis.broker.retention.dead_letters import BODY_BYTES, untrainable
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio
MOST, BYTES = 12, 20_000


async def kept(broker: Broker) -> list[int]:
    """Bytes kept of each body, by the letters. They are what the counter and the blobs themselves say."""
    redis, keys = broker.redis, broker.keys
    letters = [fields for _, fields in await redis.xrange(keys.refused)]
    told = {fields[b"gid"].decode(): int(fields.get(b"kept", 0)) for fields in letters}
    there = {
        key.decode().removeprefix(keys.blob("")) async for key in redis.scan_iter(keys.blob("refused-*"), count=1000)
    }
    assert {gid: await redis.strlen(keys.blob(gid)) for gid in there} == {
        gid: n for gid, n in told.items() if "/" not in gid
    }
    assert int(await redis.hget(keys.settings, "refused_bytes") or 0) == sum(told.values())
    assert len(told) == len(letters)
    return list(told.values())


async def test_the_count_is_exact_whatever_happens_to_the_letters(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dead_letters, commit):
        monkeypatch.setattr(module, "REFUSED_KEPT", MOST)
    chance = random.Random(random.random())
    await put(broker, *range(40))
    for number in range(150):
        action = chance.choice(("bury", "bury", "bury", "again", "purge", "commit", "reset"))
        letters = await broker.dead.all()
        if action == "bury":
            body = chance.randbytes(chance.choice((0, 1, 300, 4000, 15_000, 30_000)))
            await broker.queue.keep_refused(f"refused-{number}", body, "invalid", "why", most_bytes=BYTES)
            assert (await broker.dead.all())[-1].entry.gid == f"refused-{number}"
        elif action == "again" and letters and "/" not in letters[-1].entry.gid:
            await broker.queue.keep_refused(letters[-1].entry.gid, b"", "invalid", "why", most_bytes=BYTES)
            assert await broker.dead.all() == letters
        elif action == "purge" and letters:
            await broker.dead.purge(chance.choice(letters), who="me")
        elif action == "commit" and (await broker.queue.status()).groups > 2:
            held = await lease(broker)
            notes = [untrainable(gid, 0, "why") for gid in held.batch.gids]
            await broker.queue.commit("main", held, trained(held.batch), untrainable=notes)
        elif action == "reset":
            await broker.reset()
        sizes = await kept(broker)
        assert len(sizes) <= MOST
        assert sum(sizes) <= BYTES


async def test_a_letter_that_is_a_week_old_makes_room(broker: Broker) -> None:
    redis, keys = broker.redis, broker.keys
    old = {"gid": "refused-old", "reason": "invalid", "deliveries": 0, "detail": "why", "kept": 5, "size": 9}
    await redis.xadd(keys.refused, old, id="1-0")
    await redis.set(keys.blob("refused-old"), b"12345")
    await redis.hset(keys.settings, "refused_bytes", 5)
    await kept(broker)
    await broker.queue.keep_refused("refused-new", b"x", "invalid", "why")
    assert [letter.entry.gid for letter in await broker.dead.all()] == ["refused-new"]
    await kept(broker)


async def test_a_body_is_kept_compressed_and_cut(broker: Broker) -> None:
    body = b"x" * (5 << 20)
    await broker.queue.keep_refused("refused-x", body, "invalid", "why")
    assert sum(await kept(broker)) < 1000
    (letter,) = await broker.dead.all()
    assert (letter.cut_from, await broker.dead.body(letter)) == (len(body), body[:BODY_BYTES])


async def test_gzip_bombs_of_nan_leave_no_more_than_is_allowed(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url, "bombs")
    async with (
        serving(build_app(broker, ShimSettings(refused_bytes=100_000))) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        await client.post("/register", json=TRAINER)
        before = (await broker.redis.info("memory"))["used_memory"]
        for number in range(16):
            noise = random.Random(number).randbytes(15_000).hex()
            body = (
                f'{{"tokens":[[1]],"masks":[[1]],"scores":[NaN],"group_overrides":{{"a":"{noise}{"x" * (2 << 20)}"}}}}'
            )
            answer = await client.post(
                "/scored_data", content=gzip.compress(body.encode(), 1), headers={"Content-Encoding": "gzip"}
            )
            assert answer.status_code == 422
        sizes = await kept(broker)
        assert 0 < sum(sizes) <= 100_000
        grown = (await broker.redis.info("memory"))["used_memory"] - before
    assert grown < 1_000_000
    status = await broker.queue.status()
    assert (status.refused, status.refused_not_kept) == (16, 0)
    await broker.aclose()


async def test_while_redis_is_nearly_full_they_are_only_counted(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url, "full")
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        await broker.redis.set("filler", b"x" * (40 << 20))
        used = (await broker.redis.info("memory"))["used_memory"]
        for number, room in enumerate((2.0, 1.2, 2.0)):
            await broker.redis.config_set("maxmemory", int(used * room))
            body: dict[str, Any] = {"tokens": [[number]], "masks": [[1, 2]], "scores": [1]}
            assert (await client.post("/scored_data", json=body)).status_code == 422
    letters = await broker.dead.all()
    status = await broker.queue.status()
    assert (len(letters), status.refused, status.refused_not_kept) == (2, 3, 1)
    await kept(broker)
    await broker.aclose()

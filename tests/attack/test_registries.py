"""Whoever may call can't make a run remember without bound, or slow down what all environments ask all the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from trajectories import ENV, TRAINER, group, serving

from lachesis.broker import Broker, ConfigurationError, EmbeddedRedis
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.packing import pack, to_arrays
from lachesis.broker.records.registrations import EnvConfig
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.run import journal, registry
from lachesis.shim.app import build_app
from lachesis.shim.batch import http_trainers
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio
NAMES = ("a\nb", "\x1b]0;PWNED\x07", "a\u202eb", "a\u2028b", "x" * 201, "\x7f", "\x9b2J", "n" * 60_000)
ORDINARY = ("gsm8k", "GSM8K env (v2), 70/30", "математика", "環境 1", "[/x]boom", "")


@pytest.fixture
async def registered(broker: Broker) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a shim on the test's own run, with a trainer of batch size 4 registered and started."""
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/register", json=TRAINER)).status_code == 200
        assert (await client.get("/batch")).json() == {"batch": None}
        yield client


async def silent_for(broker: Broker, seconds: float) -> None:
    """As if nobody had called for so long."""
    redis, keys = broker.redis, broker.keys
    for env_id in await redis.zrange(keys.heard, 0, -1):
        await redis.zadd(keys.heard, {env_id: (time.time() - seconds) * 1000})
    for name in await redis.hkeys(keys.trainers):
        if name.startswith(b"http:"):
            await redis.hset(keys.trainers, name, f"{time.time() - seconds:.3f}")


async def test_environments_are_bounded_and_the_longest_silent_make_room(
    registered: httpx.AsyncClient, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MOST_ENVS", 10)

    async def register(name: str) -> httpx.Response:
        return await registered.post("/register-env", json={**ENV, "desired_name": name})

    assert [(await register(f"env{number}")).status_code for number in range(10)] == [200] * 10
    refused = await register("one-more")
    assert refused.status_code == 429
    assert "has 10 environments" in refused.json()["detail"]
    for number in range(3):  # each makes room for one
        await silent_for(broker, 700)
        assert (await register(f"later{number}")).json()["env_id"] == 10 + number
    assert [env.env_id for env in await broker.registry.envs()] == list(range(3, 13))
    assert (await registered.request("GET", "/status-env", json={"env_id": 0})).status_code == 200  # it is let go on

    fields = await broker.redis.hlen(broker.keys.envs)
    for number in range(30):
        await silent_for(broker, 24 * 3600 + 10)
        assert (await register("sums" if number % 2 else f"other{number}")).status_code == 200
        assert await broker.redis.hlen(broker.keys.envs) <= fields
    assert [env.env_id for env in await broker.registry.envs()] == [42]
    assert (await broker.registry.envs())[0].name == "sums_0"


async def test_trainers_are_bounded_and_keep_what_is_lent_to_them(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_trainers, "MOST_TRAINERS", 5)
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/register", json=TRAINER, headers={"X-Trainer-Id": "t0"})
        for number in range(2):
            assert (await client.post("/scored_data", json=group(number))).status_code == 200

        async def ask(name: str) -> httpx.Response:
            return await client.get("/batch", headers={"X-Trainer-Id": name})

        first = (await ask("t0")).json()["batch"]
        assert len(first) == 2
        assert [(await ask(f"t{number}")).status_code for number in range(1, 5)] == [200] * 4
        refused = [await ask(f"t{number}") for number in range(5, 9)]
        assert [answer.status_code for answer in refused] == [429] * 4
        assert "give each trainer one X-Trainer-Id" in refused[0].json()["detail"]
        for number in range(10, 20):
            await silent_for(broker, 700)
            assert (await ask(f"t{number}")).status_code == 200
        consumers = {each["name"] for each in await broker.redis.xinfo_consumers(broker.keys.batches, "main")}
        assert len(consumers) <= 6
        assert b"http:t0" in consumers
        await ask("t0")  # which acknowledges it
        newest = await broker.queue.newest_committed("main")
        assert newest is not None
        assert (newest.step, newest.replica) == (1, "http:t0")
        seen = await broker.redis.hkeys(broker.keys.trainers)
        assert sum(name.startswith(b"http:") for name in seen) <= 6


async def test_runs_are_bounded(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url, "own")
    async with serving(build_app(broker, ShimSettings(max_runs=3))) as url, httpx.AsyncClient(base_url=url) as client:
        for run, status in (("a", 200), ("b", 200), ("c", 200), ("d", 429), ("e", 429), ("a", 200)):
            answer = await client.post(f"/runs/{run}/register", json=TRAINER)
            assert answer.status_code == status, answer.text
        keys = await broker.redis.dbsize()
        for path, body in (
            ("scored_data", group(1)),
            ("scored_data_list", [group(1)]),
            ("scored_data", {**group(1), "masks": [[]]}),
        ):
            answer = await client.post(f"/runs/x/{path}", json=body)
            assert answer.status_code == 429
            assert "start the shim with a larger --max-runs" in answer.json()["detail"]
        for path in ("batch", "status", "reset_data", "info", "latest_example"):
            assert (await client.get(f"/runs/x/{path}")).status_code == 200
        await client.post("/runs/x/register-env", json=ENV)
        await client.post("/runs/x/disconnect-env", json={"env_id": 1})
        assert await broker.redis.dbsize() == keys
        assert (await client.post("/runs/b/scored_data", json=group(1))).status_code == 200
    await broker.aclose()


async def test_names_and_texts_are_bounded(registered: httpx.AsyncClient, broker: Broker) -> None:
    for name in NAMES:
        answer = await registered.post("/register-env", json={**ENV, "desired_name": name})
        assert answer.status_code == 422
        (told,) = answer.json()["detail"]
        assert told["loc"] == ["body", "desired_name"]
        assert "must be at most 200 printable characters" in told["msg"]
        assert len(answer.content) < 10_000
    for name in ORDINARY:
        answer = await registered.post("/register-env", json={**ENV, "desired_name": name})
        assert answer.json()["wandb_name"] == f"{name}_0"
    for field in ("wandb_group", "wandb_project", "checkpoint_dir"):
        answer = await registered.post("/register", json={**TRAINER, field: "ä" * 513})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", field]
    for name in NAMES:
        with pytest.raises(ConfigurationError, match="must be at most 200 printable characters"):
            await broker.registry.report(ServerStatus(name, "main", "http://s", "ready", 0, -1, 0.0))


async def test_the_log_of_who_did_what_is_bounded(
    registered: httpx.AsyncClient, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "KEEP_EVENTS", 20)
    texts = dict.fromkeys(("wandb_group", "wandb_project", "checkpoint_dir"), "x" * 1024)
    for _ in range(60):
        assert (await registered.post("/register", json={**TRAINER, **texts})).status_code in (200, 409)
        await broker.journal.control("e", "w" * 100_000, "d" * 100_000)
    entries: list[Any] = await broker.redis.xrange(broker.keys.control)
    assert len(entries) <= 40
    assert max(sum(map(len, fields.values())) for _, fields in entries) <= 9000


async def test_what_environments_ask_all_the_time_costs_the_same_however_many_registered(
    redis_server: EmbeddedRedis,
) -> None:
    """In bytes that Redis sends for it: after registrations with long names, sign-offs, and environments forgotten."""
    broker = await Broker.connect(redis_server.url, "many")
    config = EnvConfig(max_token_length=64, desired_name="n" * 200, weight=1.0, group_size=4, min_batch_allocation=0.0)
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/register", json=TRAINER)
        await client.get("/batch")
        await client.post("/register-env", json=ENV)

        async def cost() -> float:
            for _ in range(2):  # the first look reads who is new
                before = (await broker.redis.info("stats"))["total_net_output_bytes"]
                for _ in range(10):
                    assert (await client.request("GET", "/status-env", json={"env_id": 0})).status_code == 200
                after = (await broker.redis.info("stats"))["total_net_output_bytes"]
            return float(after - before)

        alone = await cost()
        for start in range(0, 1000, 50):
            await asyncio.gather(*(broker.registry.register_env(config, f"{start + n}") for n in range(50)))
        assert await cost() < 4 * alone  # a thousand records are 600 kB
        await client.post("/disconnect-env", json={"env_id": 500})
        before = (await broker.redis.info("stats"))["total_net_output_bytes"]
        weight = (await client.request("GET", "/status-env", json={"env_id": 0})).json()["env_weight"]
        assert (await broker.redis.info("stats"))["total_net_output_bytes"] - before < 20_000  # not all records again
        assert weight == max(0.01, 1 / 1000)
        await silent_for(broker, 90_000)
        for number in range(12):  # each forgets a hundred
            await broker.registry.register_env(config, f"again{number}")
        assert await broker.redis.zcard(broker.keys.heard) <= 13
        assert await cost() < 4 * alone  # a thousand records are 600 kB
    await broker.aclose()


async def test_groups_of_invented_environments_slow_nobody_down(broker: Broker) -> None:
    """Ids that nobody registered, another one in each post, for as long as the groups are queued."""
    await broker.queue.subscribe("main")
    packed = pack(to_arrays(ScoredGroup(tokens=[[1]], masks=[[1]], scores=[1.0])))

    async def put(number: int) -> None:
        posted = to_arrays(ScoredGroup(tokens=[[1]], masks=[[1]], scores=[1.0], env_id=number))
        assert await broker.queue.put(f"g{number}", posted, v_min=0, v_max=0, packed=packed) == "stored"

    for start in range(0, 2500, 100):
        await asyncio.gather(*(put(number) for number in range(start, start + 100)))
    assert await broker.redis.hlen(broker.keys.state) < 5100
    status = await broker.queue.status()
    assert sum(sum(sizes.values()) for sizes in status.waiting.values()) == 2500
    assert status.waiting["-"][1] > 500
    assert await broker.queue.form(2500) == 1
    assert (await broker.queue.status()).waiting == {}
    assert not [name for name in await broker.redis.hkeys(broker.keys.state) if name.startswith(b"env_")]

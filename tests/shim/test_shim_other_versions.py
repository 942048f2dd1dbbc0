"""A shim among data that it did not write itself, and trainers that come with other settings."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from msgspec import structs
from scored import trained
from silent import silence
from structlog.testing import capture_logs
from trajectories import ENV, TRAINER, group, serving

from lachesis.broker import Broker
from lachesis.broker.records.versions import ServerStatus, WeightsEntry
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def another(broker: Broker) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a shim just started, on the same run."""
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


# -- registrations ------------------------------------------------------------------------------------------------


def registrations() -> dict[str, bytes]:
    newer = {**TRAINER, "num_steps": 7}
    return {
        "another order": json.dumps(dict(reversed(newer.items()))).encode(),
        "one field more": json.dumps({**newer, "optimizer": "muon"}).encode(),
        "by hand": json.dumps(newer, indent=2).encode(),
        "a field less": json.dumps({name: value for name, value in newer.items() if name != "wandb_group"}).encode(),
        "no JSON": b"{batch_size: 4}",
        "no UTF-8": b"\xff\xfe",
        "empty": b"",
    }


@pytest.mark.parametrize("stored", registrations().values(), ids=registrations())
async def test_a_registration_that_this_version_writes_otherwise_is_replaced(
    client: httpx.AsyncClient, broker: Broker, stored: bytes
) -> None:
    await broker.redis.hset(broker.keys.trainers, "config", stored)
    with anyio.fail_after(30):
        for path in ("/info", "/wandb_info", "/status", "/healthz", "/latest_example"):
            assert (await client.get(path)).status_code == 200
        assert (await client.request("GET", "/status-env", json={"env_id": 0})).status_code == 200
        assert (await client.post("/scored_data", json=group(1))).status_code == 200
        assert (await client.post("/register", json=TRAINER)).status_code == 200
        assert (await client.get("/batch")).json()["batch"] is None
    assert (await client.get("/info")).json() == {"batch_size": 4, "max_token_len": 64}


async def test_settings_that_can_not_be_read_are_not_taken_from_a_trainer_at_work(
    client: httpx.AsyncClient, broker: Broker
) -> None:
    await broker.redis.hset(broker.keys.trainers, "config", b"{}")
    async with broker.registry.writer("main", ttl_s=60):
        response = await client.post("/register", json=TRAINER)
    assert response.status_code == 409
    assert "settings that can't be read" in response.json()["detail"]


@pytest.mark.parametrize(("batch_size", "max_token_len"), [(2, 64), (4, 32)])
async def test_a_trainer_with_other_settings_gets_only_what_they_allow(
    registered: httpx.AsyncClient, broker: Broker, batch_size: int, max_token_len: int
) -> None:
    for number, length in ((1, 3), (2, 40), (3, 3), (4, 3)):
        assert (await registered.post("/scored_data", json=group(number, 2, length=length))).status_code == 200
    await broker.queue.subscribe("main")
    assert await broker.queue.form(4) == 1  # for a trainer that does not come any more
    await broker.redis.hdel(broker.keys.trainers, "http:127.0.0.1")
    settings = {**TRAINER, "batch_size": batch_size, "max_token_len": max_token_len}
    assert (await registered.post("/register", json=settings)).status_code == 200
    assert (await registered.get("/status")).json()["queue_size"] == (4 if max_token_len == 64 else 3)
    batch = (await registered.get("/batch")).json()["batch"]
    rows = [row for item in batch for row in item["tokens"]]
    assert len(rows) == batch_size
    assert max(map(len, rows)) <= max_token_len


async def test_who_died_between_registration_and_refitting_is_made_up_for(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    for number in (1, 2):
        await registered.post("/scored_data", json=group(number, 2))
    await broker.queue.subscribe("main")
    assert await broker.queue.form(4) == 1
    config = await broker.registry.trainer_config()
    assert config is not None
    await broker.registry.register_trainer(type(config)(**{**TRAINER, "batch_size": 2}))
    assert len((await registered.get("/batch")).json()["batch"]) == 1


# -- who trained it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retired", [False, True])
async def test_an_http_trainer_whose_batch_another_has_trained_is_told_in_the_log(
    registered: httpx.AsyncClient, broker: Broker, retired: bool
) -> None:
    await registered.post("/scored_data", json=group(1, 4))
    slow = {"X-Trainer-Id": "slow"}
    assert (await registered.get("/batch", headers=slow)).json()["batch"]
    taken = await broker.queue.lease("main", "http:fast", lapse_s=0)
    assert taken is not None
    await broker.queue.commit("main", taken, trained(taken.batch, "http:fast"))
    if retired:
        assert await broker.queue.retire("main", 1) == 1
    with capture_logs() as logs:
        assert (await registered.get("/batch", headers=slow)).json() == {"batch": None}
    lost = [line for line in logs if line["event"] == "batch_lost"]
    assert [(line["trainer"], line["step"]) for line in lost] == [("http:slow", 1)]
    assert [entry.replica async for entry in broker.queue.ledger("main")] == ["http:fast"]


async def test_a_trainer_whose_batches_were_all_deleted_goes_on_with_the_next(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    for number in (1, 2):
        await registered.post("/scored_data", json=group(number, 4))
    assert (await registered.get("/batch")).json()["batch"]
    await broker.redis.delete(broker.keys.batches)
    batch = (await registered.get("/batch")).json()["batch"]
    assert [item["tokens"][0][0] for item in batch] == [2]
    assert (await registered.get("/batch")).json() == {"batch": None}
    assert [entry.step async for entry in broker.queue.ledger("main")] == [2]


# -- bounds of versions -------------------------------------------------------------------------------------------


def server(version: int) -> ServerStatus:
    return ServerStatus("s", "main", "http://s", "ready", version, -1, 0.0)  # whatever its clock says


async def bounds(broker: Broker, client: httpx.AsyncClient, number: int) -> tuple[int, int]:
    assert (await client.post("/scored_data", json=group(number))).status_code == 200
    entry = (await broker.queue.queued())[-1][1]
    return entry.v_min, entry.v_max


async def test_the_bounds_of_what_nobody_watched_are_those_of_who_did(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    for version in (4, 5, 6):
        await broker.weights.publish("main", WeightsEntry(version, version, "file:///v", "0", 1, "BF16", version - 1))
    await broker.registry.report(server(4))
    assert await bounds(broker, registered, 1) == (4, 6)
    await broker.registry.report(server(6))
    assert await bounds(broker, registered, 2) == (4, 6)
    async with another(broker) as fresh:
        assert await bounds(broker, fresh, 3) == (4, 6)
        await broker.registry.withdraw("s")
        assert await bounds(broker, fresh, 4) == (4, 6)


async def test_what_is_no_version_was_not_served(registered: httpx.AsyncClient, broker: Broker) -> None:
    await broker.weights.publish("main", WeightsEntry(6, 6, "file:///v", "0", 1, "BF16", 5))
    await broker.registry.report(server(4))
    await broker.redis.zadd(broker.keys.served, {"by hand": 1})
    assert await bounds(broker, registered, 1) == (4, 6)


async def test_a_version_is_forgotten_when_no_generation_can_have_begun_on_it(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    await broker.weights.publish("main", WeightsEntry(6, 6, "file:///v", "0", 1, "BF16", 5))
    await broker.registry.report(server(4))
    await broker.redis.delete(broker.keys.pools)  # else it was served until the next report
    await broker.redis.zincrby(broker.keys.served, -301_000, "4")
    await broker.registry.report(server(6))
    assert await bounds(broker, registered, 1) == (6, 6)


async def test_a_server_of_an_earlier_release_counts_by_its_heartbeat(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    """Its agent sets the field of `pools` alone."""
    await broker.weights.publish("main", WeightsEntry(6, 6, "file:///v", "0", 1, "BF16", 5))
    for heartbeat, expected in ((time.time() - 3600, (6, 6)), (time.time(), (4, 6))):
        status = structs.replace(server(4), heartbeat=heartbeat)
        await broker.redis.hset(broker.keys.pools, "s", msgspec.json.encode(status))
        assert await bounds(broker, registered, int(heartbeat)) == expected


# -- the registry -------------------------------------------------------------------------------------------------


async def replies(broker: Broker) -> int:
    """Bytes that Redis has sent so far."""
    return int((await broker.redis.info("stats"))["total_net_output_bytes"])


async def ask(client: httpx.AsyncClient, env_id: int = 0) -> dict[str, Any]:
    response = await client.request("GET", "/status-env", json={"env_id": env_id})
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def cost(broker: Broker, client: httpx.AsyncClient) -> int:
    """What Redis sends for a hundred calls."""
    await ask(client)  # what has changed since is read once
    before = await replies(broker)
    for _ in range(100):
        await ask(client)
    return await replies(broker) - before


@pytest.mark.parametrize("alive", [True, False])
async def test_status_env_costs_the_same_however_many_environments_registered(
    registered: httpx.AsyncClient, broker: Broker, alive: bool
) -> None:
    await registered.post("/register-env", json=ENV)
    one = await cost(broker, registered)
    config = (await broker.registry.envs())[0].config
    for number in range(1, 300):
        await broker.registry.register_env(config, f"n{number}")
    if not alive:
        await broker.redis.zadd(broker.keys.heard, {str(number): 1 for number in range(1, 300)})
        await silence(broker, 1)
    assert (await ask(registered))["env_weight"] == (0.01 if alive else 1.0)
    assert await cost(broker, registered) < 1.2 * one


async def test_replicas_see_who_comes_and_goes_at_the_other(registered: httpx.AsyncClient, broker: Broker) -> None:
    async with another(broker.for_run(broker.keys.run)) as other:
        await registered.post("/register-env", json=ENV)
        weights = [(await ask(other))["env_weight"]]
        await registered.post("/register-env", json=ENV)
        weights.append((await ask(other))["env_weight"])
        await registered.post("/disconnect-env", json={"env_id": 1})
        weights.append((await ask(other))["env_weight"])
        await registered.get("/reset_data")
        weights.append((await ask(other))["env_weight"])
        assert weights == [1.0, 0.5, 1.0, 1.0]


async def test_counters_of_environments_that_have_nothing_queued_are_not_kept(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    for number in range(4):
        await registered.post("/register-env", json=ENV)
        await registered.post("/scored_data", json=group(number, 4, env_id=number))
        assert (await registered.get("/batch")).json()["batch"]
    assert [name for name in await broker.redis.hkeys(broker.keys.state) if name.startswith(b"env_")] == []

"""A whole job on every server, with its worst hours: killed while it accepts, and full."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import httpx
import pytest
from redis.exceptions import OutOfMemoryError
from scored import group as scored
from scored import trained
from trajectories import ENV, TRAINER, group, number_of, serving

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.records.registrations import EnvConfig, TrainerConfig
from lachesis.broker.records.versions import ServerStatus, WeightsEntry
from lachesis.broker.store.server import check_server
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
GROUPS, KILL_AT = 60, (15, 30, 45)


async def train(client: httpx.AsyncClient) -> list[int]:
    """Take and acknowledge every batch there is; the numbers of the groups that came."""
    numbers: list[int] = []
    while batch := (await client.get("/batch")).json()["batch"]:
        numbers += [number_of(item) for item in batch]
    return numbers


@pytest.mark.parametrize("fsync", ["always", "everysec"])
async def test_a_killed_server_keeps_what_was_accepted(server_binary: str, tmp_path: Path, fsync: str) -> None:
    with EmbeddedRedis(tmp_path, server=server_binary, config=[f"appendfsync {fsync}"]) as server:
        broker = await Broker.connect(server.url)
        app = build_app(broker, ShimSettings())
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
            await client.post("/register", json=TRAINER)
            await client.get("/batch")
            assert (await client.post("/register-env", json=ENV)).json()["env_id"] == 0
            accepted, reached = 0, {count: asyncio.Event() for count in KILL_AT}

            async def post(start: int) -> None:
                nonlocal accepted
                for number in range(start, GROUPS, 4):
                    reply = await client.post("/scored_data", json=group(number, env_id=0))
                    assert reply.json() == {"status": "received"}
                    accepted += 1
                    if accepted in reached:
                        reached[accepted].set()

            async def kill_now_and_then() -> None:
                for event in reached.values():
                    await event.wait()
                    assert server.pid is not None
                    os.kill(server.pid, signal.SIGKILL)
                    await anyio.to_thread.run_sync(os.waitid, os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
                    assert server.revive()

            await asyncio.gather(*(post(start) for start in range(4)), kill_now_and_then())
            numbers = await train(client)
        report = await audit(broker)
        assert report.findings == []
        assert len(numbers) == len(set(numbers)) == report.trained
        if fsync == "always":  # everysec may lose what was answered while an fsync ran
            assert set(numbers) == set(range(GROUPS))
            assert (report.accepted, report.steps, report.queued) == (GROUPS, GROUPS // 2, 0)
        await broker.aclose()


@pytest.fixture
async def full(redis_server: EmbeddedRedis) -> AsyncIterator[Broker]:
    """Two batches, and no room for anything more; the trainer is still to come."""
    broker = await Broker.connect(redis_server.url)
    for number in range(4):
        await broker.queue.put(f"g{number}", scored(number), v_min=0, v_max=0)
    await broker.redis.config_set("maxmemory", "1")
    yield broker
    await broker.aclose()


async def test_a_full_server_lets_a_trainer_come_and_drain_it(full: Broker) -> None:
    with pytest.raises(OutOfMemoryError):
        await full.queue.put("more", scored(9), v_min=0, v_max=0)
    lock = full.registry.writer("main", ttl_s=30)
    assert await lock.acquire(blocking=False)
    await full.registry.register_trainer(TrainerConfig("g", "p", 4, 16, "", 1, 0, 1))
    await full.registry.start()
    await full.registry.report(ServerStatus("s", "main", "http://s", "ready", 0, -1, 0.0))
    await full.registry.register_env(EnvConfig(16, "sums", 1.0, 2), "nonce")
    await full.queue.subscribe("main")
    for step in (1, 2):
        lease = await full.queue.lease_or_form("main", "r", 4, lapse_s=60)
        assert lease is not None
        assert await full.queue.renew("main", lease)
        assert await lock.extend(30, replace_ttl=True)
        assert len(await full.queue.fetch(lease.batch.gids)) == 2
        await full.queue.commit("main", lease, trained(lease.batch), token=lock.local.token.decode())
        await full.weights.publish("main", WeightsEntry(step, step, "file:///v", "0", 1, "BF16", step - 1))
        await full.journal.metric("step", {"step": step})
        await full.journal.control("step", "r")
        assert await full.queue.settled("main") == step
        assert await full.queue.retire("main", step) == 1
    await lock.release()
    await full.redis.config_set("maxmemory", "0")
    assert (await audit(full)).findings == []
    assert (await full.queue.status()).groups == 0


async def test_a_server_is_known_by_what_it_can_do(server_binary: str, redis_server: EmbeddedRedis) -> None:
    server = await check_server(redis_server.url)
    name = Path(server_binary).parent.name  # e.g. valkey-9.1
    assert server.name.lower().replace(" ", "-").startswith(name)
    assert server.append_only

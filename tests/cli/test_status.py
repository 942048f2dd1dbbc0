"""`lachesis status`: who of a run is alive, and an exit code that says whether it can go on."""

from __future__ import annotations

import json
import time

import anyio.to_thread
import pytest
from replicas import founded

from lachesis.broker import Broker
from lachesis.broker.records.registrations import EnvConfig, TrainerConfig
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.records.versions import ServerStatus
from lachesis.cli.main import main

pytestmark = pytest.mark.anyio
CONFIG = TrainerConfig("g", "p", 4, 16, "", 1, 0, num_steps=2)
ENV = EnvConfig(max_token_length=16, desired_name="sums", weight=1.0, group_size=2)


@pytest.fixture
async def alive(broker: Broker) -> Broker:
    """A run whose trainer holds the policy, with a ready server and an environment that just called."""
    await broker.registry.register_trainer(CONFIG)
    assert await broker.registry.writer("main", ttl_s=600).acquire(blocking=False)
    await broker.registry.report(ServerStatus("s0", "main", "http://s0", "ready", 3, -1, time.time()))
    await broker.registry.register_env(ENV, "nonce")
    return broker


async def status(broker: Broker, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    arguments = ["status", "--redis-url", broker.url, "--run", broker.keys.run, *options]
    code = await anyio.to_thread.run_sync(main, arguments)
    return code, " ".join(capsys.readouterr().out.split())


async def test_a_run_that_can_go_on_is_healthy(alive: Broker, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = await status(alive, capsys)
    assert code == 0
    assert "health healthy" in said
    assert "alive: a trainer" in said
    assert "s0 ready version 3" in said
    assert "sums_0 groups of 2 heard 0 s ago" in said


async def test_who_is_gone_is_named_with_the_time_and_the_exit_code_is_1(
    alive: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    await alive.redis.delete(alive.keys.writer("main"))
    await alive.registry.report(ServerStatus("s0", "main", "http://s0", "ready", 3, -1, time.time() - 300))
    await alive.redis.zadd(alive.keys.heard, {"0": 1000 * (time.time() - 7300)})
    code, said = await status(alive, capsys)
    assert code == 1
    assert "NOT healthy: no trainer is alive; no server is ready; no environment is alive" in said
    assert "2 steps; none is alive" in said
    assert "s0 gone: silent since 5 min ago; it served version 3" in said
    assert "sums_0 groups of 2 gone: silent since 2 h ago" in said
    told = json.loads((await status(alive, capsys, "--json"))[1])
    assert (told["healthy"], told["finished"], len(told["problems"]), told["trainers"]) == (False, False, 3, [])


@pytest.mark.parametrize("lost", ["trainer", "server", "environment"])
async def test_one_kind_of_part_that_is_missing_is_enough(
    alive: Broker, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if lost == "trainer":
        await alive.redis.delete(alive.keys.writer("main"))
    elif lost == "server":
        await alive.registry.report(ServerStatus("s0", "main", "http://s0", "failed", -1, -1, time.time()))
    else:
        await alive.redis.zadd(alive.keys.heard, {"0": 1000 * (time.time() - 61)})
    code, said = await status(alive, capsys)
    assert (code, f"no {lost} is" in said) == (1, True)


async def test_an_http_trainer_and_a_replica_count_as_trainers(
    alive: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    await alive.redis.delete(alive.keys.writer("main"))
    await alive.redis.hset(alive.keys.trainers, "http:10.0.0.7", f"{time.time():.3f}")
    code, said = await status(alive, capsys)
    assert (code, "alive: http:10.0.0.7" in said) == (0, True)
    await alive.redis.hset(alive.keys.trainers, "http:10.0.0.7", f"{time.time() - 120:.3f}")
    assert (await status(alive, capsys))[0] == 1
    await founded(alive, "r1:abc")
    code, said = await status(alive, capsys)
    assert (code, "alive: replica r1" in said) == (0, True)


async def test_a_finished_run_is_finished_however_quiet_it_is(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    await broker.registry.register_trainer(CONFIG)
    entry = LedgerEntry(2, ("g",), 4, 9, 1, 2, 0, 1, "me", 0.5, 0.1, 1.0, time.time())
    fields = {name: str(getattr(entry, name)) for name in entry.__struct_fields__} | {"gids": "g"}
    await broker.redis.xadd(broker.keys.ledger("main"), fields, "2-0")
    code, said = await status(broker, capsys)
    assert (code, "finished: all 2 steps are trained" in said) == (0, True)


async def test_looking_at_a_run_that_is_not_there_makes_none(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (await status(broker, capsys))[0] == 2
    assert await broker.redis.keys(f"*{broker.keys.run}*") == []
    assert broker.keys.run not in await broker.runs()

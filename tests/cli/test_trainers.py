"""`lachesis trainers`: what a person sees of replicas, on a real Redis."""

from __future__ import annotations

import json

import pytest
from commands import lachesis
from replicas import BATCH, founded, lent, opened
from scored import group

from lachesis.broker import Broker
from lachesis.broker.records.steps import LedgerEntry

pytestmark = pytest.mark.anyio


@pytest.fixture
def where(broker: Broker) -> tuple[str, ...]:
    return ("--redis-url", broker.url, "--run", broker.keys.run)


async def fill(broker: Broker, groups: int) -> None:
    for number in range(groups):
        assert await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0) == "stored"


async def test_a_run_that_nobody_trains(broker: Broker, where: tuple[str, ...]) -> None:
    await broker.enlist()
    assert lachesis("trainers", *where).stdout == f"run {broker.keys.run!r}: no policy is trained yet\n"
    await broker.queue.subscribe("main")
    await fill(broker, 2)
    assert await broker.queue.form(BATCH) == 1
    assert lachesis("trainers", *where).stdout == "policy main: no trainer, no step committed yet\n"


async def test_one_trainer_that_is_no_replica(broker: Broker, where: tuple[str, ...]) -> None:
    lock = broker.registry.writer("main", ttl_s=60)
    assert await lock.acquire(blocking=False)
    shown = lachesis("trainers", "--policy", "main", *where).stdout
    assert shown == "policy main: one trainer, no step committed yet\n"


async def test_replicas_and_what_they_hold(broker: Broker, where: tuple[str, ...]) -> None:
    """Two of them share a step: one has voted, the other has just come and has no weights yet."""
    await fill(broker, 4)
    alone = await opened(broker)
    await broker.members.claim(alone, 1, count=2, held=0)
    batch = await broker.queue.batch(1)
    assert batch is not None
    entry = LedgerEntry(1, batch.gids, batch.n, batch.tok, 0, 1, 0, 0, "a", 0.5, 0.1, 1.0)
    assert await broker.members.vote(alone, 1, "digest", entry)
    joined = await broker.members.join("main", "late:0123456789ab", generation=1, step=-1)
    assert joined is not None

    lines = lachesis("trainers", *where).stdout.splitlines()
    assert lines[0].startswith("policy main: 2 replicas, generation 1, epoch 2, no step open, step 1 committed ")
    assert lines[0].endswith(" ago by a")
    assert "  first  " in lines[1]
    assert "first" not in lines[2]
    assert "step 1" in lines[1]
    assert "0 groups" in lines[1]
    assert "no weights yet" in lines[2]
    assert "0.00 groups/s" in lines[2]
    assert "0.00 groups/s" not in lines[1]
    assert "heartbeat" in lines[2]

    [told] = json.loads(lachesis("trainers", "--json", *where).stdout)
    assert told["standing"] == {"generation": 1, "epoch": 2, "step": 1, "open": 0, "won": 1}
    assert [(one["id"], one["trained"]) for one in told["replicas"]] == [("a", 2), ("late:0123456789ab", 0)]


async def test_replicas_that_fell_silent_do_not_look_alive(broker: Broker, where: tuple[str, ...]) -> None:
    await fill(broker, 4)
    await opened(broker)
    await broker.redis.zadd(broker.keys.beats("main"), {"a": 1000})
    shown = lachesis("trainers", *where)
    first, row = shown.stdout.splitlines()
    assert first.startswith("policy main: no replica is alive, ")
    assert "gone: last heartbeat " in row


async def test_the_open_step_and_who_has_voted_for_it(broker: Broker, where: tuple[str, ...]) -> None:
    await fill(broker, 2)
    await founded(broker, "a:1")
    me = await broker.members.join("main", "b:2", generation=1, step=0)
    assert me is not None
    step = await lent(broker)
    assert await broker.members.open_step(me, step)
    await broker.members.claim(me, step, count=2, held=0)
    batch = await broker.queue.batch(step)
    assert batch is not None
    entry = LedgerEntry(step, batch.gids, batch.n, batch.tok, 0, 1, 0, 0, "b", 0.5, 0.1, 1.0)
    assert not await broker.members.vote(me, step, "digest", entry)
    lines = lachesis("trainers", *where).stdout.splitlines()
    assert "step 1 open, no step committed yet" in lines[0]
    assert "2 groups, voted" in lines[2]
    assert lines[2].split()[0] == "b"

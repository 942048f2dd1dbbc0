"""`lachesis shadow`: what a person sees of policies that train on the same batches, on a real Redis."""

from __future__ import annotations

import json

import pytest
from commands import lachesis
from scored import group, trained

from lachesis.broker import Broker
from lachesis.broker.retention.shadows import Rule

pytestmark = pytest.mark.anyio
BATCH = 4


@pytest.fixture
def where(broker: Broker) -> tuple[str, ...]:
    return ("--redis-url", broker.url, "--run", broker.keys.run)


async def form(broker: Broker, steps: int) -> None:
    for number in range(2 * steps):
        assert await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0) == "stored"
    for step in range(1, steps + 1):
        assert await broker.queue.form(BATCH) == step


async def train(broker: Broker, policy: str, kind: str, loss: float) -> None:
    lease = await broker.queue.lease(policy, "t", lapse_s=60)
    assert lease is not None
    await broker.queue.commit(policy, lease, trained(lease.batch))
    values = {"policy": policy, "step": lease.batch.step, "loss": loss, "grad_norm": 2.0}
    await broker.journal.metric(kind, values)


async def test_a_run_that_nobody_trains(broker: Broker, where: tuple[str, ...]) -> None:
    await broker.enlist()
    assert lachesis("shadow", *where).stdout == f"run {broker.keys.run!r}: no policy is trained yet\n"


async def test_policies_side_by_side(broker: Broker, where: tuple[str, ...]) -> None:
    await broker.queue.subscribe("main")
    await broker.queue.subscribe("waits", Rule("lossless", 4))
    await form(broker, 4)
    await broker.queue.subscribe("runs", Rule("lossy", 3))
    for step in range(4):
        await train(broker, "main", "step", loss=step)
    await train(broker, "runs", "shadow", loss=7.0)  # step 2
    shown = lachesis("shadow", *where).stdout
    assert [" ".join(line.split()) for line in shown.splitlines()[:4]] == [
        "policy reads step trained skipped behind",
        "main asks for batches 4 4 0 0",
        "runs lossy, at most 3 behind 2 1 1 2",
        "waits lossless, at most 4 behind 0 0 0 4 no batch is formed until it has trained one",
    ]
    status = " ".join(lachesis("status", *where).stdout.split())
    assert (
        "shadow runs lossy, 2 batches behind shadow waits lossless, 4 batches behind; no batch is formed until"
        in status
    )
    assert shown.endswith("\nno step that all of them have trained and told of yet\n")

    for loss in (1.0, 3.0):
        await train(broker, "waits", "shadow", loss)
    await broker.journal.metric("shadow", {"policy": "removed", "step": 9, "loss": 1.0})
    found = json.loads(lachesis("shadow", "--json", *where).stdout)
    assert found["steps"] == [2]
    assert found["means"] == {
        "main": {"loss": 1.0, "grad_norm": 2.0},
        "runs": {"loss": 7.0, "grad_norm": 2.0},
        "waits": {"loss": 3.0, "grad_norm": 2.0},
    }
    shown = lachesis("shadow", "--steps", "1", *where).stdout
    _, title, table = shown.partition("means over 1 steps that all have trained, 2 to 2")
    assert title
    assert [line.split() for line in table.strip().splitlines()] == [
        ["policy", "loss", "grad_norm"],
        ["main", "1.0000", "2"],
        ["runs", "7.0000", "2"],
        ["waits", "3.0000", "2"],
    ]


async def test_one_that_is_gone_is_removed(broker: Broker, where: tuple[str, ...]) -> None:
    await broker.queue.subscribe("main")
    await broker.queue.subscribe("gone", Rule("lossless", 1))
    await form(broker, 1)
    for name, said in (("main", "not a shadow; one of gone"), ("other", "not a shadow; one of gone")):
        refused = lachesis("shadow", "--remove", name, *where)
        assert (refused.returncode, refused.stderr) == (2, f"lachesis shadow: remove = {name!r}: {said}\n")
    lock = broker.registry.writer("gone", ttl_s=60)
    assert await lock.acquire(blocking=False)
    assert "its trainer is at work; end it first" in lachesis("shadow", "--remove", "gone", *where).stderr
    await lock.release()
    lease = await broker.queue.lease("main", "t", lapse_s=60)
    assert lease is not None
    await broker.queue.commit("main", lease, trained(lease.batch))
    await broker.queue.retire("main", 1)
    assert len(await broker.queue.batches()) == 1
    assert lachesis("shadow", "--remove", "gone", *where).returncode == 0
    assert await broker.queue.batches() == []
    assert await broker.queue.readers() == ["main"]

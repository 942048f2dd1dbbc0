"""`lachesis tail`: what a run told, readable, and followed while it goes on."""

from __future__ import annotations

import json
import subprocess

import pytest
from commands import LACHESIS, lachesis, python
from warm import WarmProcess

from lachesis.broker import Broker

pytestmark = pytest.mark.anyio

STEP = {
    "num_steps": 9,
    "reward": 0.25,
    "loss": -0.5,
    "lag": 1,
    "tokens_per_s": 12345.0,
    "step_s": 2.0,
    "wait_share": 0.5,
}
EXAMPLE = {
    "step": 3, "gid": "0123456789abcdef0123", "env": 4, "row": 1, "score": 1.0, "advantage": -0.7071067, "v_min": 1, "v_max": 2,
    "tokens": 9, "trained_tokens": 4, "prompt": "What is [bold]3 + 4?", "response": " Seven.",
}  # fmt: skip


@pytest.fixture
async def where(broker: Broker) -> tuple[str, ...]:
    metric = broker.journal.metric
    for step in range(1, 4):
        await metric("step", STEP | {"step": step})
    await metric("example", EXAMPLE)
    await metric("example", EXAMPLE | {"row": 2, "v_max": 1, "advantage": "-"})
    await metric("eval", {"version": 3, "accuracy": 0.875, "n": 200})
    return ("--redis-url", broker.url, "--run", broker.keys.run)


async def test_the_newest_steps_a_line_each(where: tuple[str, ...]) -> None:
    done = lachesis("tail", "--lines", "3", *where)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        *(f"step {step}/9  reward 0.250  loss -0.5000  lag 1  tokens/s 12,345  s 2.00  wait 50%" for step in (2, 3)),
        "held-out accuracy 0.875 with version 3, 200 problems",
    ]
    assert len(lachesis("tail", *where).stdout.splitlines()) == 4
    objects = [json.loads(line) for line in lachesis("tail", "--json", "--lines", "2", *where).stdout.splitlines()]
    assert [one["kind"] for one in objects] == ["step", "eval"]


async def test_examples_can_be_read(where: tuple[str, ...]) -> None:
    shown = lachesis("tail", "--examples", *where).stdout
    assert "step 3 · score 1 · advantage -0.707107 · version 1 to 2" in shown
    assert "advantage - · version 1 " in shown
    assert "group 0123456789abcdef, sequence 1 · environment 4 · 9 tokens" in shown
    assert "What is [bold]3 + 4?" in shown  # as it is: no markup
    assert "Seven." in shown
    assert "held-out accuracy 0.875" in shown
    assert "reward" not in shown


async def test_a_run_that_told_nothing_says_so(broker: Broker) -> None:
    done = lachesis("tail", "--redis-url", broker.url, "--run", broker.keys.run)
    assert (done.returncode, done.stdout) == (0, f"run {broker.keys.run!r} has told nothing yet\n")


def start(*arguments: str) -> WarmProcess:
    return python.start(*LACHESIS, *arguments, stdout=subprocess.PIPE)


async def test_what_comes_is_followed(broker: Broker, where: tuple[str, ...]) -> None:
    with start("tail", "--lines", "1", "--follow", *where) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("held-out")
        await broker.journal.metric("example", EXAMPLE)
        await broker.journal.metric("step", STEP | {"step": 4})
        assert process.stdout.readline().startswith("step 4/9")
        process.terminate()


async def test_the_newest_of_a_kind_are_found_among_many(broker: Broker) -> None:
    await broker.journal.metric("eval", {"version": 1, "accuracy": 0.5, "n": 1})
    for step in range(3):
        await broker.journal.metric("step", {"step": step})
    async with broker.redis.pipeline(transaction=False) as pipe:
        for step in range(3, 1200):
            pipe.xadd(broker.keys.metrics, {"kind": "step", "step": step})
        await pipe.execute()
    end, found = await broker.journal.newest(2, {"eval"})
    assert [fields["version"] for fields in found] == ["1"]
    assert await broker.journal.metrics(end) == []
    _, found = await broker.journal.newest(700, {"step"})
    assert [fields["step"] for fields in found] == [str(step) for step in range(500, 1200)]
    assert await broker.journal.newest(0, {"step"}) == (end, [])

"""`lachesis tail`: what a run told, readable, and followed while it goes on."""

from __future__ import annotations

import json
import re
import subprocess

import anyio.to_thread
import pytest
from commands import LACHESIS, lachesis, python
from warm import WarmProcess

from lachesis.broker import Broker
from lachesis.cli.main import main

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
    await metric("example", EXAMPLE | {"env_name": "sums", "row": 2, "v_max": 1, "advantage": "-"})
    await metric("eval", {"version": 3, "accuracy": 0.875, "n": 200})
    return ("--redis-url", broker.url, "--run", broker.keys.run)


def start(*arguments: str) -> WarmProcess:
    return python.start(*LACHESIS, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


async def test_the_newest_steps_a_line_each(where: tuple[str, ...]) -> None:
    done = lachesis("tail", "--lines", "3", *where)
    assert done.returncode == 0
    times, told = zip(*(line.split("  ", 1) for line in done.stdout.splitlines()), strict=True)
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", at) for at in times)
    assert list(told) == [
        *(f"step {step}/9  reward 0.250  loss -0.5000  lag 1  tokens/s 12,345  s 2.00  wait 50%" for step in (2, 3)),
        "held-out accuracy 0.875 with version 3, 200 problems",
    ]
    assert len(lachesis("tail", *where).stdout.splitlines()) == 4
    objects = [json.loads(line) for line in lachesis("tail", "--json", "--lines", "2", *where).stdout.splitlines()]
    assert [one["kind"] for one in objects] == ["step", "eval"]


async def tail(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines it prints, in this process."""
    assert await anyio.to_thread.run_sync(main, ["tail", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


async def test_json_has_numbers_as_numbers_and_the_time(
    broker: Broker, where: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    await broker.journal.metric("step", {"step": 4, "loss": float("nan"), "policy": "7", "env_score/sums": 0.5})
    evaluated, step = map(json.loads, await tail(capsys, "--json", "--lines", "2", *where))
    assert (evaluated["accuracy"], evaluated["version"], evaluated["n"]) == (0.875, 3, 200)
    assert (step["step"], step["loss"], step["policy"], step["env_score/sums"]) == (4, None, "7", 0.5)
    assert 0 <= step["at"] - evaluated["at"] < 600
    examples = [json.loads(line) for line in await tail(capsys, "--examples", "--json", *where)]
    assert [(one.get("row"), one.get("advantage")) for one in examples] == [(1, -0.707107), (2, None), (None, None)]


async def test_what_another_release_told_is_shown_as_it_is(
    broker: Broker, where: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    await broker.redis.xadd(broker.keys.metrics, {"kind": "eval", "score": "0.5"})
    await broker.redis.xadd(broker.keys.metrics, {"kind": "step", "step": "one", "reward": "good"})
    first, second = await tail(capsys, "--lines", "2", *where)
    assert first.endswith("  kind eval  score 0.5")
    assert second.endswith("  kind step  step one  reward good")


async def test_scores_are_shown_by_environment_where_there_are_several(
    broker: Broker, where: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    await broker.journal.metric("step", STEP | {"step": 4, "env_score/sums": 0.5, "env_score/words": 0.25})
    assert (await tail(capsys, "--lines", "1", *where))[0].endswith("wait 50%  sums 0.500  words 0.250")


async def test_who_came_and_went_can_be_read(
    broker: Broker, where: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    record = '{"env_id":0,"name":"sums_0","config":{"group_size":2,"min_batch_allocation":null},"connected":true}'
    await broker.journal.control("register-env", "sums_0", record)
    await broker.journal.control("training", "host", "main from step 3")
    first, second = await tail(capsys, "--control", *where)
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  register-env     sums_0  env_id 0  name sums_0  ", first)
    assert first.endswith("group_size 2")
    assert second.endswith("  training         host  main from step 3")
    [told] = map(json.loads, await tail(capsys, "--control", "--json", "--lines", "1", *where))
    assert (told["event"], told["who"]) == ("training", "host")
    assert told["at"] > 1e9


@pytest.mark.parametrize("json_too", [(), ("--json",)])
async def test_a_reader_that_goes_away_ends_it_without_a_word(
    broker: Broker, where: tuple[str, ...], json_too: tuple[str, ...]
) -> None:
    for version in range(60):  # more than a pipe holds
        await broker.redis.xadd(broker.keys.metrics, {"kind": "update", "version": version, "note": "x" * 5000})
    with start("tail", "--lines", "500", *json_too, *where) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() != 0


async def test_examples_can_be_read(where: tuple[str, ...]) -> None:
    shown = lachesis("tail", "--examples", *where).stdout
    assert "step 3 · score 1 · advantage -0.707107 · version 1 to 2" in shown
    assert "advantage - · version 1 " in shown
    assert "group 0123456789abcdef, sequence 1 · environment 4 · 9 tokens" in shown
    assert "environment sums ·" in shown
    assert "What is [bold]3 + 4?" in shown  # as it is: no markup
    assert "Seven." in shown
    assert "held-out accuracy 0.875" in shown
    assert "reward" not in shown


async def test_a_run_that_told_nothing_says_so(broker: Broker) -> None:
    await broker.enlist()
    done = lachesis("tail", "--redis-url", broker.url, "--run", broker.keys.run)
    assert (done.returncode, done.stdout) == (0, f"run {broker.keys.run!r} has told nothing yet\n")


async def test_what_comes_is_followed(broker: Broker, where: tuple[str, ...]) -> None:
    with start("tail", "--lines", "1", "--follow", *where) as process:
        assert process.stdout is not None
        assert "  held-out" in process.stdout.readline()
        await broker.journal.metric("example", EXAMPLE)
        await broker.journal.metric("step", STEP | {"step": 4})
        assert "  step 4/9" in process.stdout.readline()
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
    assert [fields["version"] for _, fields in found] == ["1"]
    assert await broker.journal.metrics(end) == []
    _, found = await broker.journal.newest(700, {"step"})
    assert [fields["step"] for _, fields in found] == [str(step) for step in range(500, 1200)]
    assert await broker.journal.newest(0, {"step"}) == (end, [])

"""What the display of `lachesis up` is told: steps, the curve of held-out accuracy, and what keeps servers from their version."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lachesis.broker import Broker
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry
from lachesis.broker.weights.pools import NONE
from lachesis.cli.up.progress import View
from lachesis.cli.up.supervisor import Part, Supervisor
from lachesis.cli.up.watch import watch

pytestmark = pytest.mark.anyio


@pytest.fixture
async def watched(broker: Broker, tmp_path: Path) -> AsyncIterator[tuple[View, Supervisor]]:
    view, supervisor = View(title="t", steps=9), Supervisor(lambda text: None)
    supervisor.parts = {name: Part(name, (), tmp_path / name) for name in ("trainer", "s0")}
    task = asyncio.create_task(watch(broker, view, supervisor, lambda: None))
    yield view, supervisor
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.02)


async def test_it_warns_while_a_pool_is_pinned_or_a_server_cannot_load(
    broker: Broker, watched: tuple[View, Supervisor]
) -> None:
    view, _ = watched
    await broker.weights.publish("main", WeightsEntry(5, 5, "/v", "0", 1, "BF16", 4))
    stuck = ServerStatus("s0", "main", "http://s0", "ready", 4, -1, time.time() + 60, last_error="version 5 is torn")
    await broker.registry.report(stuck)
    await until(lambda: view.warnings == ["s0 (ready, version 4): version 5 is torn"])
    assert await broker.pools.set_rule("main", PoolRule("pin", 4), NONE)
    await until(lambda: len(view.warnings) == 2)
    assert view.warnings[0].startswith("pool main: pinned to version 4")


async def test_a_committed_step_and_a_ready_server_are_what_parts_are_for(
    broker: Broker, watched: tuple[View, Supervisor]
) -> None:
    view, supervisor = watched
    await broker.journal.metric("eval", {"version": 0, "accuracy": 0.25, "n": 9})
    await broker.journal.metric("eval", {"from": "another release"})
    step = {"version": 1, "lag": 0, "reward": 0.5, "tokens_per_s": 9.0, "wait_share": 0.1, "env_score/sums": 0.5}
    await broker.journal.metric("step", {"step": 1, **step})
    await until(lambda: view.step == 1 and supervisor.parts["trainer"].useful)
    assert (view.held_out, view.scores) == ([(0, 0.25)], {"sums": 0.5})
    assert not supervisor.parts["s0"].useful
    await broker.registry.report(ServerStatus("s0", "main", "http://s0", "ready", 1, -1, time.time() + 60))
    await until(lambda: supervisor.parts["s0"].useful)

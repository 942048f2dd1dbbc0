"""A request of which servers die costs two of them, and nobody else their answer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import fake_sglang
import pytest
import roles
from aiohttp import web
from doors import Upstream, answers, door, hangs_up, post
from fake_sglang import DEADLY
from published import make_model

from lachesis.broker import Broker
from lachesis.inference.gateway import poison
from lachesis.inference.gateway.poison import Poison

pytestmark = pytest.mark.anyio

SERVERS = ("s0", "s1", "s2")


@pytest.fixture
async def agents(broker: Broker, tmp_path: Path) -> AsyncIterator[None]:
    """A pool of servers that really die, and are started again by their agents."""
    base = make_model(tmp_path / "base")
    async with AsyncExitStack() as stack:
        for name in SERVERS:
            await stack.enter_async_context(fake_sglang.agent(broker, tmp_path / name, name, model=str(base)))
        with anyio.fail_after(120):
            while [status.state for status in await broker.registry.servers()] != ["ready"] * len(SERVERS):  # noqa: ASYNC110
                await anyio.sleep(0.05)
        yield


def deaths(folder: Path) -> int:
    """How many servers died of a request."""
    return sum(path.read_text().count("deadly") for path in folder.rglob("sglang-*.log"))


async def test_a_deadly_request_costs_two_servers_and_nobody_else(broker: Broker, agents: None, tmp_path: Path) -> None:
    async with door(broker, patience_s=120) as client:

        async def ask(*ids: int, after_s: float = 0.0) -> tuple[int, Any]:
            await anyio.sleep(after_s)
            return await post(client, input_ids=[*ids], return_logprob=False)

        # all of them run on its first server, or come to its second one meanwhile
        others = [asyncio.create_task(ask(9, number, after_s=0.02 * (number % 20))) for number in range(60)]
        status, answer = await ask(1, DEADLY)
        assert (status, answer["error"]["message"].partition(":")[0]) == (
            502,
            "2 servers were lost while they ran this request",
        )
        assert {status for status, _ in await asyncio.gather(*others)} == {200}
        assert deaths(tmp_path) == 2

        for _ in range(5):  # a client that does not give up
            status, answer = await ask(1, DEADLY)
            assert status == 502
            assert "it is refused for 60 s" in answer["error"]["message"]
        assert (await ask(1, 2))[0] == 200
        assert deaths(tmp_path) == 2


@pytest.mark.usefixtures("agents")
async def test_what_runs_on_a_killed_server_is_answered_elsewhere(broker: Broker) -> None:
    async with door(broker, patience_s=120) as client:
        asked = [asyncio.create_task(post(client, input_ids=[number], return_logprob=False)) for number in range(60)]
        await anyio.sleep(0.1)
        os.kill(next(pid for pid in roles.below(os.getpid()) if fake_sglang.serves(pid)), signal.SIGKILL)
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}


async def test_one_suspect_at_a_time_is_tried_on_a_server(broker: Broker) -> None:
    running = most = 0

    async def counts(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await anyio.sleep(0.05)
        running -= 1
        return await answers(request, body)

    first = [hangs_up] * 8
    async with Upstream(broker, "s", *first, counts).running() as server, door(broker) as client:
        statuses = await asyncio.gather(*(post(client, input_ids=[number]) for number in range(8)))

    assert [status for status, _ in statuses] == [200] * 8
    assert len(server.bodies) == 16
    assert most == 1


async def test_a_completion_of_many_prompts_is_refused_as_a_whole(broker: Broker) -> None:
    async with Upstream(broker, "s", hangs_up).running() as server, door(broker) as client:
        async with client.post("/v1/completions", json={"prompt": [5], "n": 16}) as response:
            assert response.status == 502
        assert len(server.bodies) <= 16 + 1  # of the second try, one


def test_what_is_remembered_of_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "MOST_PROMPTS", 3)
    known = Poison()
    for number in range(5):
        known.add({"input_ids": [number]}, now=number)
    assert [known.refuses({"input_ids": [number]}, now=5) for number in range(5)] == [False, False, True, True, True]
    assert known.refuses({"input_ids": [4], "rid": "other", "sampling_params": {"n": 2}}, now=63.9)
    assert not known.refuses({"input_ids": [3]}, now=63.9)
    assert not known.refuses({"input_ids": [4]}, now=64)
    assert not known._until

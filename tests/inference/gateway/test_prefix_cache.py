"""Whose cached prefixes a request may go on from, where the cache outlives the weights."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import numpy as np
import pytest
import roles
from aiohttp import web
from clients import generate
from doors import Upstream, answers, door, good, post
from hf_reference import Reference
from published import VOCAB, make_model, publish

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.versions import PoolRule
from lachesis.inference.gateway import proxy

pytestmark = pytest.mark.anyio

SPAN = [{"version": "5", "start": 0, "end": 2}]
SAMPLING = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True}
TOLERANCE = 1e-4  # of a log-prob in float32


async def test_requests_carry_the_key_of_the_servers_weights(broker: Broker) -> None:
    async with Upstream(broker, "s", answers).running() as server, door(broker) as client:
        await post(client)
        assert "extra_key" not in server.bodies[0]
        server.prefix_key = "3.1"  # the answers' first token is version 3's
        server.version = 3
        await server.report()
        await _until_asked(client, server, "3.1")
        server.bodies.clear()
        assert await post(client, extra_key="mine") == (200, good())
        await post(client, extra_key=["mine"], input_ids=[[1, 2]])
        for _ in range(2):
            async with client.post("/generate", json={"text": "a", "stream": True}) as response:
                await response.read()
    shared, listed, *streams = [body["extra_key"] for body in server.bodies]
    assert (shared, listed) == ("3.1 mine", ["3.1 mine"])
    assert len({*streams, "3.1"}) == 3  # a stream can't be asked for again, so it shares nothing


async def _until_asked(client: aiohttp.ClientSession, server: Upstream, key: str) -> None:
    with anyio.fail_after(60):
        while server.bodies[-1].get("extra_key") != key:
            await post(client)


async def test_what_may_go_on_from_other_weights_prefix_is_asked_for_again(broker: Broker) -> None:
    async def stale(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(good(weight_versions=SPAN, cached_tokens=2))

    async def uncached(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(good(weight_versions=SPAN, cached_tokens=0))

    server = Upstream(broker, "s", stale, uncached, uncached)
    server.prefix_key = "4.2"
    async with server.running(), door(broker) as client:
        for _ in range(2):
            status, answer = await post(client)
            assert (status, answer["meta_info"]["cached_tokens"]) == (200, 0)
    first, again, next_ = [body["extra_key"] for body in server.bodies]
    assert (first, next_) == ("4.2", "4.2")  # what was not cached is no older than its first token
    assert len(again) == 32  # the status is behind, so the second try shares nothing


async def test_such_a_server_gets_no_requests_while_it_updates(broker: Broker) -> None:
    server = Upstream(broker, "s", answers)
    server.prefix_key, server.version = "3.0", 3
    async with server.running(), door(broker) as client:
        assert (await post(client))[0] == 200
        reports = server.report

        async def updating(state: str = "updating") -> None:
            await reports(state)

        server.report = updating  # type: ignore[method-assign]
        with anyio.fail_after(60):
            while (await (await client.get("/health")).json())["ready"]:  # noqa: ASYNC110
                await anyio.sleep(0.02)
        waiting = asyncio.create_task(post(client))
        await anyio.sleep(0.5)
        assert len(server.bodies) == 1
        server.report = reports  # type: ignore[method-assign]
        assert (await waiting)[0] == 200


async def test_behind_a_router_nothing_is_shared(broker: Broker) -> None:
    server = Upstream(broker, "s", answers)
    server.prefix_key = "3.0"
    async with server.running():
        await server.report()
        async with door(broker, upstream=server.url) as client:
            for _ in range(2):
                assert (await post(client))[0] == 200
    assert len({body["extra_key"] for body in server.bodies} | {"3.0"}) == 3


# -- on a real SGLang ---------------------------------------------------------------------------------------------


@pytest.fixture
def agent(redis_server: EmbeddedRedis, tmp_path: Path) -> Iterator[Path]:
    """The base model of a server in mode in_place."""
    base = make_model(tmp_path / "base")
    options = ("--redis-url", redis_server.url, "--state-dir", str(tmp_path), "--server", "s0", "--model", str(base))
    role = roles.agent(tmp_path / "agent.log", *options, "--update-mode", "in_place")
    yield base
    role.kill()


@pytest.mark.sglang
@pytest.mark.parametrize("keys", ["shared", "own"])
async def test_no_answer_goes_on_from_a_prefix_of_other_weights(
    redis_server: EmbeddedRedis, agent: Path, tmp_path: Path, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts come again and again, so they are cached, while versions come, and two come back, under the requests.

    What an answer's first version made has Hugging Face's log-probs; it would not, had other weights read its prompt:
    that is what who asks the server itself, without a key, gets. Under keys of their own, which they have while Redis is
    away, requests find only what SGLang read for all their outputs at once.
    """
    if keys == "own":
        monkeypatch.setattr(proxy, "NO_NEW_REQUESTS_S", -1.0)
    store, stop = tmp_path / "store", False
    done: list[tuple[dict[str, Any], int, Any]] = []
    prompts = np.random.default_rng(0).integers(5, VOCAB, (6, 96)).tolist()
    another = prompts[0][::-1]
    reference = Reference(lambda version: store / f"v{version:06d}")
    broker = await Broker.connect(redis_server.url)

    async def ask(client: aiohttp.ClientSession, prompt: list[int], n: int) -> None:
        body = {"input_ids": prompt, "sampling_params": SAMPLING | {"n": n}, "return_logprob": True}
        while not stop:
            status, told = await generate(client, body)
            assert status == 200, told
            done.extend((body, status, each) for each in (told if n > 1 else [told]))

    async def serve(version: int) -> None:
        with anyio.fail_after(120):
            while [(s.version, s.state) for s in await broker.registry.servers()] != [(version, "ready")]:  # noqa: ASYNC110
                await anyio.sleep(0.02)

    async def answered_from_cache(version: int) -> None:
        began = len(done)
        with anyio.fail_after(120):
            while not any(version_of(answer) == str(version) and cached(answer) for _, _, answer in done[began:]):  # noqa: ASYNC110
                await anyio.sleep(0.02)

    async def rule(wanted: PoolRule) -> None:
        judged, _ = await broker.pools.rule("main")
        assert await broker.pools.set_rule("main", wanted, judged)

    async def pin(version: int) -> None:
        await rule(PoolRule("pin", version))
        await serve(version)
        await answered_from_cache(version)

    async def straight(prompt: list[int], **key: str) -> tuple[dict[str, Any], int, Any]:
        [status] = await broker.registry.servers()
        body = {"input_ids": prompt, "sampling_params": SAMPLING, "return_logprob": True, **key}
        async with aiohttp.ClientSession(status.url) as direct:
            return body, *await generate(direct, body)

    await publish(broker, agent, store, 1)
    await serve(1)
    async with door(broker, patience_s=120.0) as client:
        clients = [asyncio.create_task(ask(client, prompt, 1 + index % 3)) for index, prompt in enumerate(prompts)]
        for version in range(2, 8):
            await publish(broker, agent, store, version)
            await serve(version)
            await answered_from_cache(version)
        await pin(6)
        [status] = await broker.registry.servers()
        missed = {"extra_key": status.prefix_key}  # what a front door sends that hears of no update from now on
        await pin(7)
        await straight(another, **missed)
        await pin(6)
        came_back = await straight(another, **missed)
        await pin(7)
        stop = True
        await asyncio.gather(*clients)
        await straight(prompts[0])
        await rule(PoolRule("newest"))
        await publish(broker, agent, store, 8)
        await serve(8)
        without_key = await straight(prompts[0])
    await broker.aclose()

    tokens, largest = reference.difference(map(only_first_version, done))
    by_version = Counter(version_of(answer) for _, _, answer in done if cached(answer))
    spanning = sum(len(answer["meta_info"]["weight_versions"]) > 1 for _, _, answer in done)
    stale = reference.difference([only_first_version(without_key)])[1]
    print(f"{len(done)} answers, {tokens} tokens, |Δ| ≤ {largest:.1e}, without a key {stale:.1e}; {spanning} of two versions; cached: {by_version}")  # fmt: skip
    assert largest <= TOLERANCE
    assert spanning
    assert version_of(came_back[2]) == "6"
    assert reference.difference([only_first_version(came_back)])[1] <= TOLERANCE
    assert cached(without_key[2])
    assert stale > 100 * TOLERANCE


def version_of(answer: Any) -> str:
    return str(answer["meta_info"]["weight_versions"][0]["version"])


def cached(answer: Any) -> bool:
    """Whether all of its prompt but the last tokens was read before."""
    return int(answer["meta_info"]["cached_tokens"]) > 90


def only_first_version(call: tuple[dict[str, Any], int, Any]) -> tuple[dict[str, Any], int, Any]:
    """Of a request that went through an update in place, the rest was made on a cache of two versions."""
    body, status, answer = call
    meta = answer["meta_info"]
    return body, status, {**answer, "meta_info": {**meta, "weight_versions": meta["weight_versions"][:1]}}

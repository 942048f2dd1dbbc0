"""A real SGLang server under its agent, behind a real front door."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import numpy as np
import pytest
import roles
from clients import CLIENTS, generate, load, request, stream
from published import VOCAB, make_model, publish, random_weights, tear, write_version

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.versions import ServerStatus
from lachesis.inference.agent.sglang_process import SGLangServer

pytestmark = [pytest.mark.anyio, pytest.mark.sglang]

RUN = "agent-tests"


class Bench:
    """One Redis, one agent with its SGLang, one front door, and a store of versions."""

    def __init__(self, redis: EmbeddedRedis, folder: Path) -> None:
        self.url, self.folder = redis.url, folder
        self.base, self.store = make_model(folder / "base"), folder / "store"
        self.listener = roles.listener()
        self.door_url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        common = ("--redis-url", redis.url, "--run", RUN, "--state-dir", str(folder))
        self.agent_options = (*common, "--server", "s0", "--model", str(self.base))
        self.door = roles.front_door(
            folder / "door.log", *common, "--fd", str(self.listener.fileno()), inherit=self.listener
        )
        self.agent: roles.Role | None = None
        self.written = self.version = 0  # the newest that was written, and the newest that can be served

    async def publish(self, broker: Broker) -> int:
        """Publish the next version; its number."""
        self.version = self.next()
        await publish(broker, self.base, self.store, self.version)
        return self.version

    def next(self) -> int:
        """The number of a version to be written."""
        self.written += 1
        return self.written

    def start_agent(self) -> roles.Role:
        self.agent = roles.agent(self.folder / "agent.log", *self.agent_options)
        return self.agent

    def sglang(self) -> int:
        """Process id of SGLang's main process."""
        assert self.agent is not None
        return roles.below(self.agent.process.pid)[0]

    def kill_agent(self) -> None:
        if self.agent is not None:
            self.agent.kill()

    def close(self) -> None:
        for role in (self.agent, self.door):
            if role is not None:
                role.kill()
        self.listener.close()


@pytest.fixture(scope="module")
def stage(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Without a server, until a test has one started."""
    bench = Bench(shared_redis, tmp_path_factory.mktemp("bench"))
    yield bench
    bench.close()


@pytest.fixture
async def bench(stage: Bench, broker: Broker) -> Bench:
    """The server ready with the newest version, whatever was done to it before."""
    if not stage.version:
        await stage.publish(broker)
    if stage.agent is None or stage.agent.process.poll() is not None:
        stage.start_agent()
        await status_where(broker, version=-1)  # what the one before said is gone
    await status_where(broker, state="ready", version=stage.version)
    return stage


@pytest.fixture
async def broker(stage: Bench) -> AsyncIterator[Broker]:
    client = await Broker.connect(stage.url, RUN)
    yield client
    await client.aclose()


@pytest.fixture
async def client(stage: Bench) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(stage.door_url, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def status_where(broker: Broker, timeout_s: float = 120.0, **fields: Any) -> ServerStatus:
    """The server's status, once these fields have these values."""
    found = None
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        servers = await broker.registry.servers("main")
        found = servers[0] if servers else None
        if found is not None and all(getattr(found, name) == value for name, value in fields.items()):
            return found
        await anyio.sleep(0.02)
    raise AssertionError(f"never {fields} within {timeout_s:g} s; the last status was {found}")


async def test_it_starts_from_the_newest_version(stage: Bench, broker: Broker, client: aiohttp.ClientSession) -> None:
    stage.kill_agent()
    versions = [await stage.publish(broker) for _ in range(2)]
    waiting = asyncio.create_task(generate(client, request()))  # while there is no server

    stage.start_agent()
    announced = await status_where(broker, state="starting", loading=versions[-1])
    ready = await status_where(broker, state="ready")

    assert announced.version == -1  # nothing is served yet, and the newest is safe from the collector already
    assert (ready.version, ready.loading, ready.vocab_size) == (versions[-1], -1, VOCAB)
    status, answer = await waiting
    assert (status, answer["meta_info"]["weight_version"]) == (200, str(versions[-1]))


async def test_updates_under_load_fail_no_request(bench: Bench, broker: Broker, client: aiohttp.ClientSession) -> None:
    versions = []
    async with load(client) as clients:
        for _ in range(3):
            seen = len(clients.done)
            while len(clients.done) < seen + CLIENTS:  # noqa: ASYNC110
                await anyio.sleep(0.02)
            versions.append(str(await bench.publish(broker)))
            await status_where(broker, version=bench.version, state="ready")

    assert clients.failures() == []
    assert set(clients.by_version()) >= set(versions)
    spanning = [answer for _, _, answer in clients.done if len(answer["meta_info"]["weight_versions"]) > 1]
    assert spanning

    digests = [tokens_digest(body["input_ids"] + answer["output_ids"]) for body, _, answer in clients.done]
    lineages = await broker.lineage.look_up(digests)
    for lineage, (_, _, answer) in zip(lineages, clients.done, strict=True):
        spans = answer["meta_info"]["weight_versions"]
        assert lineage is not None
        assert lineage.spans == tuple((int(span["version"]), span["start"], span["end"]) for span in spans)
        assert lineage.v_min == int(spans[0]["version"])

    updates = [fields for _, fields in await broker.journal.metrics() if fields["kind"] == "update"]
    updates = [fields for fields in updates if fields["version"] in versions]
    assert [fields["version"] for fields in updates] == versions
    assert all(0 < float(fields["load_s"]) < float(fields["pause_s"]) for fields in updates)


async def test_the_weights_are_those_that_were_published(
    bench: Bench, broker: Broker, client: aiohttp.ClientSession
) -> None:
    """Greedy log-probs change with the version, and come back with the same weights under another number."""

    async def fingerprint() -> list[float]:
        body = {"input_ids": [9, 10, 11], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        _, answer = await generate(client, body | {"return_logprob": True})
        return [round(token[0], 4) for token in answer["meta_info"]["output_token_logprobs"]]

    found = []
    for seed in (100, 200, 100):
        bench.version = bench.next()
        entry = write_version(bench.base, bench.store, bench.version, weights=random_weights(seed))
        await broker.weights.publish("main", entry)
        await status_where(broker, version=bench.version, state="ready")
        found.append(await fingerprint())

    assert found[0] == pytest.approx(found[2], abs=1e-3)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


async def test_bad_versions_are_refused_and_the_old_one_serves_on(
    bench: Bench, broker: Broker, client: aiohttp.ClientSession
) -> None:
    pid = bench.sglang()
    weights = random_weights(1)
    norm = weights["model.norm.weight"]
    without = {name: array for name, array in weights.items() if name != "model.norm.weight"}
    ways: tuple[dict[str, Any], ...] = (
        {"spoil": tear},
        {"weights": without},
        {"weights": without | {"model.norm.weight": norm * np.float32("nan")}},
        {"spoil": lambda folder: (folder / "config.json").write_text("{}")},
        {"weights": without | {"model.norm.weight": norm[:32]}},
    )
    bad = [write_version(bench.base, bench.store, bench.next(), **how) for how in ways]
    old = bench.version
    async with load(client) as clients:
        for entry in bad:
            await broker.weights.publish("main", entry)
            with anyio.fail_after(120):
                while f"version {entry.version} refused" not in (await status_where(broker)).last_error:  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            assert (await status_where(broker)).version == old
        new = await bench.publish(broker)
        good = await status_where(broker, version=new, state="ready")

    assert clients.failures() == []
    assert set(clients.by_version()) <= {str(old), str(new)}
    assert good.last_error == ""
    assert bench.sglang() == pid


async def test_a_version_that_was_collected_is_passed_over(bench: Bench, broker: Broker) -> None:
    entry = write_version(bench.base, bench.store, bench.next())
    Path(entry.uri).rename(bench.store / "collected")
    await broker.weights.publish("main", entry)
    version = await bench.publish(broker)

    assert (await status_where(broker, version=version, state="ready")).last_error == ""


async def test_requests_that_kill_sglang_are_refused(bench: Bench, client: aiohttp.ClientSession) -> None:
    pid = bench.sglang()
    for body in (
        request() | {"input_ids": [5, VOCAB]},
        request() | {"input_ids": [-1]},
        request() | {"sampling_params": {"stop_token_ids": [VOCAB], "min_new_tokens": 1}},
        request() | {"top_logprobs_num": VOCAB + 1},
    ):
        assert (await generate(client, body))[0] == 400
    async with client.post("/v1/completions", json={"model": "m", "prompt": [VOCAB]}) as response:
        assert (await response.json())["error"]["field"] == "prompt[0]"

    penalised = request() | {"sampling_params": {"max_new_tokens": 2, "repetition_penalty": 1.2}}
    with anyio.fail_after(120):
        assert (await generate(client, penalised))[0] == 200
    assert bench.sglang() == pid


async def test_openai_routes_and_streams(bench: Bench, client: aiohttp.ClientSession) -> None:
    chat = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
    async with client.post("/v1/chat/completions", json=chat | {"logprobs": True}) as response:
        answer = await response.json()
        assert response.status == 200
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["metadata"]["weight_version"] == str(bench.version)

    async with client.post("/v1/chat/completions", json=chat | {"stream": True}) as response:
        assert response.content_type == "text/event-stream"
        assert (await response.text()).endswith("data: [DONE]\n\n")
    async with client.post("/generate", json=request(4) | {"stream": True}) as response:
        *chunks, end = (await response.text()).strip().split("\n\n")  # a busy server puts tokens together
        assert end == "data: [DONE]"
        assert json.loads(chunks[-1].removeprefix("data: "))["meta_info"]["completion_tokens"] == 4

    several = request(4)
    several["sampling_params"]["n"] = 3
    status, answers = await generate(client, several)
    assert (status, len(answers)) == (200, 3)


async def until_running(broker: Broker, count: int) -> None:
    """Return when SGLang says that it runs so many requests."""
    server = (await status_where(broker)).url
    with anyio.fail_after(120):
        async with aiohttp.ClientSession() as direct:
            while True:
                async with direct.get(f"{server}/v1/loads?include=core") as response:
                    if (await response.json())["loads"][0]["num_running_reqs"] == count:
                        return


@pytest.mark.usefixtures("bench")
async def test_what_a_client_left_stops_at_sglang(broker: Broker, client: aiohttp.ClientSession) -> None:
    left = asyncio.create_task(generate(client, request(500)))
    await until_running(broker, 1)
    left.cancel()
    await until_running(broker, 0)


async def test_a_request_that_has_just_begun_is_seen(bench: Bench, broker: Broker) -> None:
    """Whoever waits for SGLang to be idle must not overlook it."""
    sglang = SGLangServer(["sleep", "60"], {}, (await status_where(broker)).url, bench.folder / "none.log")
    async with sglang, aiohttp.ClientSession() as direct:
        assert await sglang.is_idle()
        pieces = stream(direct, sglang.url, 200)
        await anext(pieces)
        seen_idle = await sglang.is_idle()
        async for piece in pieces:
            last = piece
        assert last["meta_info"]["completion_tokens"] == 200
        assert not seen_idle
        with anyio.fail_after(120):
            while not await sglang.is_idle():  # its last step may still end
                pass


async def test_sglang_killed_under_load_fails_no_request(
    bench: Bench, broker: Broker, client: aiohttp.ClientSession
) -> None:
    async with load(client) as clients:
        while not clients.done:  # noqa: ASYNC110
            await anyio.sleep(0.02)
        os.kill(bench.sglang(), signal.SIGKILL)
        failed = await status_where(broker, state="failed")
        version = await bench.publish(broker)
        await status_where(broker, version=version, state="ready")
        before = len(clients.done)
        while len(clients.done) == before:  # noqa: ASYNC110
            await anyio.sleep(0.02)

    assert failed.last_error == "SGLang: killed by SIGKILL"
    assert clients.failures() == []
    assert clients.by_version()[str(version)] > 0


async def test_sglang_dies_with_its_agent_and_a_new_agent_starts_afresh(
    bench: Bench, broker: Broker, client: aiohttp.ClientSession
) -> None:
    assert bench.agent is not None
    children = roles.below(bench.agent.process.pid)
    assert len(children) >= 3

    bench.agent.kill()
    roles.eventually(lambda: not any(map(roles.alive, children)), 60, "SGLang gone with its agent")
    waiting = asyncio.create_task(generate(client, request()))
    version = await bench.publish(broker)
    bench.start_agent()

    assert (await status_where(broker, state="ready", version=version)).updates == 0
    assert (await waiting)[0] == 200


async def test_sigterm_drains_and_leaves_the_pool(bench: Bench, broker: Broker, client: aiohttp.ClientSession) -> None:
    assert bench.agent is not None
    children = roles.below(bench.agent.process.pid)
    running = [asyncio.create_task(generate(client, request(400))) for _ in range(4)]
    await until_running(broker, 4)

    code = await anyio.to_thread.run_sync(bench.agent.stop)

    assert code == 0
    assert [status for status, _ in await asyncio.gather(*running)] == [200] * 4
    assert await broker.registry.servers("main") == []
    assert not any(map(roles.alive, children))

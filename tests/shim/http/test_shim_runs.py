"""`/runs/<run>/…`: every route, for any number of runs, through one shim."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator

import anyio
import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from trajectories import ENV, TRAINER, group, number_of, serving

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.shim.app import build_app
from lachesis.shim.http.run_router import Runs
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
async def own(redis_server: EmbeddedRedis) -> AsyncIterator[Broker]:
    """The shim's own run, on a Redis where there are no others."""
    broker = await Broker.connect(redis_server.url, "home")
    yield broker
    await broker.aclose()


@pytest.fixture
async def shim(own: Broker) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(build_app(own, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


async def a_job(client: httpx.AsyncClient, prefix: str, number: int) -> None:
    """Every route once, under one prefix; all groups have this number."""

    async def get(path: str) -> object:
        response = await client.get(prefix + path)
        assert response.status_code == 200, response.text
        return response.json()

    async def post(path: str, body: object, content: bytes = b"") -> httpx.Response:
        body = {"content": content, "headers": {"Content-Encoding": "gzip"}} if content else {"json": body}
        response = await client.post(prefix + path, **body)
        assert response.status_code == 200, response.text
        return response

    assert await get("/") == {"message": "AtroposLib API"}
    await post("/register", {**TRAINER, "starting_step": number})
    assert await get("/batch") == {"batch": None}
    assert (await post("/register-env", ENV)).json()["starting_step"] == number
    await post("/scored_data", None, gzip.compress(json.dumps(group(number, 4)).encode()))
    await post("/scored_data_list", [group(number, 2, length=4), group(number, 2, length=5)])
    assert await get("/status") == {"current_step": number, "queue_size": 3}
    told = await client.request("GET", f"{prefix}/status-env", json={"env_id": 0})
    assert told.json()["queue_size"] == 4
    assert await get("/info") == {"batch_size": 4, "max_token_len": 64}
    assert await get("/wandb_info") == {"group": "group", "project": "project"}
    assert number_of(await get("/latest_example")) == number  # type: ignore[arg-type]
    batch = await get("/batch")
    assert [number_of(item) for item in batch["batch"]] == [number]  # type: ignore[index]
    assert (await post("/disconnect-env", {"env_id": 0})).json() == {"status": "success"}


async def test_runs_do_not_see_each_other(shim: httpx.AsyncClient, own: Broker) -> None:
    for number, prefix in enumerate(("", "/runs/a", "/runs/b")):
        await a_job(shim, prefix, number)
    for number, prefix in enumerate(("", "/runs/a", "/runs/b")):
        assert (await shim.get(f"{prefix}/status")).json() == {"current_step": number + 1, "queue_size": 2}
        health = (await shim.get(f"{prefix}/healthz")).json()
        assert health["run"] == ("home", "a", "b")[number]
        assert health["groups"] == {"stored": 3, "duplicate": 0, "refused": 0}
    assert (await shim.get("/runs/home/status")).json() == (await shim.get("/status")).json()
    assert (await shim.get("/runs/a/reset_data")).text == "Reset successful"
    assert (await shim.get("/runs/a/status")).json()["queue_size"] == 0
    assert (await shim.get("/runs/b/status")).json()["queue_size"] == 2
    assert (await own.for_run("b").queue.status()).groups == 2


async def test_the_list_of_runs(shim: httpx.AsyncClient, own: Broker) -> None:
    assert (await shim.get("/runs")).json() == {"runs": []}
    assert (await shim.post("/runs/b/register-env", json=ENV)).json() == {"status": "wait for trainer to start"}
    await shim.post("/runs/b/register", json=TRAINER)
    native = own.for_run("a")  # registered by a trainer that does not use the shim
    config = await own.for_run("b").registry.trainer_config()
    assert config is not None
    await native.registry.register_trainer(config)
    await native.registry.start()
    assert (await shim.post("/runs/a/register-env", json=ENV)).json()["status"] == "success"
    listed = (await shim.get("/runs")).json()["runs"]
    assert [run["run"] for run in listed] == ["b", "a"]
    assert listed[0]["since"] <= listed[1]["since"]
    assert (await shim.get("/runs/b/runs")).status_code == 404


async def test_to_look_at_a_run_does_not_make_it(shim: httpx.AsyncClient, own: Broker) -> None:
    for path in ("/", "/info", "/wandb_info", "/status", "/batch", "/latest_example", "/healthz"):
        assert (await shim.get(f"/runs/nobody{path}")).status_code == 200
    assert (await shim.get("/runs/nobody/batch")).json()["batch"] == []
    await shim.post("/runs/nobody/register-env", json=ENV)
    assert await own.redis.dbsize() == 0


@pytest.mark.parametrize("name", ["a b", "-a", "a:b", "a{b}", "x" * 65])
async def test_impossible_names_are_refused_with_the_rule(shim: httpx.AsyncClient, name: str) -> None:
    for method, path in (("GET", "/status"), ("POST", "/register"), ("GET", "")):
        response = await shim.request(method, f"/runs/{name}{path}", json=TRAINER)
        assert response.status_code == 400
        assert response.json()["detail"].startswith("run = ")
        assert "use 1 to 64 letters, digits, '_', '-' or '.', starting with a letter or digit" in response.text


async def test_methods_paths_and_slashes_as_without_the_prefix(shim: httpx.AsyncClient) -> None:
    for method, path in (
        ("GET", "/nothing"), ("GET", "/nothing/"), ("POST", "/batch"), ("GET", "/register"), ("HEAD", "/batch"),
        ("HEAD", "/healthz"), ("HEAD", "/"), ("GET", "/status/"), ("DELETE", "/scored_data"),
    ):  # fmt: skip
        bare, prefixed = [await shim.request(method, prefix + path) for prefix in ("", "/runs/a")]
        assert prefixed.status_code == bare.status_code, path
        assert prefixed.content == bare.content, path
        if (location := bare.headers.get("location")) is not None:
            assert prefixed.headers["location"] == location.replace("/status", "/runs/a/status")
    assert (await shim.get("/runs/a")).json() == {"message": "AtroposLib API"}
    assert (await shim.post("/runs")).status_code == 405


async def test_compression(shim: httpx.AsyncClient) -> None:
    await shim.post("/runs/a/register", json=TRAINER)
    await shim.post("/runs/a/scored_data", json=group(1, size=4, length=64))
    for path in ("/runs/a/latest_example", "/runs/a/batch"):
        response = await shim.get(path, headers={"Accept-Encoding": "gzip"})
        assert response.headers["content-encoding"] == "gzip"


async def test_a_hundred_runs_share_connections(shim: httpx.AsyncClient, own: Broker) -> None:
    await shim.post("/register", json=TRAINER)
    before = len(await own.redis.client_list())
    for number in range(100):
        await shim.post(f"/runs/r{number}/register", json=TRAINER)
    assert len(await own.redis.client_list()) == before
    assert len((await shim.get("/runs")).json()["runs"]) == 101


async def test_parts_of_runs_are_made_once_and_dropped_when_too_many_are_kept() -> None:
    made: list[str] = []
    waiting = anyio.Event()

    def make(run: str) -> ASGIApp:
        made.append(run)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"].endswith("/wait"):
                await waiting.wait()

        return app

    runs = Runs(make, "own", kept=3)

    async def call(path: str) -> None:
        await runs({"type": "http", "path": path}, None, None)  # type: ignore[arg-type]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, "/runs/busy/wait")
        await anyio.wait_all_tasks_blocked()
        for path in ("/", "/runs/a/", "/runs/a", "/runs/b/", "/runs/c/", "/runs/busy/", "/runs/own/"):
            await call(path)
        assert made == ["own", "busy", "a", "b", "c"]
        waiting.set()
    await call("/runs/c/")
    assert made == ["own", "busy", "a", "b", "c"]
    for run in ("d", "e", "busy"):
        await call(f"/runs/{run}/")
    assert made[5:] == ["d", "e", "busy"]
    await call("/")
    assert made.count("own") == 1

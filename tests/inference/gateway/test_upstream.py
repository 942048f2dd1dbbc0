"""A router between the front door and the pool's servers: a plain proxy, and sglang-router where it is installed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import pytest
from aiohttp import web
from doors import Upstream, answers, door, good, post

from lachesis.broker import Broker
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.versions import WeightsEntry
from lachesis.service.ports import find_free

pytestmark = pytest.mark.anyio

Router = Callable[[list[str], Path], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def plain_proxy(workers: list[str], folder: Path) -> AsyncIterator[str]:
    """Sends each request to the next worker that can be reached."""
    async with aiohttp.ClientSession() as session:

        async def forward(request: web.Request) -> web.Response:
            for _ in workers:
                workers.append(workers.pop(0))
                try:
                    async with session.post(workers[-1] + request.path, data=await request.read()) as response:
                        return web.Response(body=await response.read(), content_type="application/json")
                except aiohttp.ClientConnectorError:
                    continue
            return web.Response(status=503)

        app = web.Application()
        app.router.add_post("/{path:.*}", forward)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        await runner.cleanup()


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


@asynccontextmanager
async def sglang_router(workers: list[str], folder: Path) -> AsyncIterator[str]:
    assert SGLANG_ROUTER is not None
    port, prometheus = find_free("127.0.0.1"), find_free("127.0.0.1")
    command = [SGLANG_ROUTER, "launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *workers]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(prometheus), "--policy", "round_robin"]
    url = f"http://127.0.0.1:{port}"
    process = started(command, folder / "router.log")
    try:
        with anyio.fail_after(60):
            async with aiohttp.ClientSession() as session:
                while True:
                    try:
                        async with session.get(url + "/readiness") as response:
                            if response.status == 200:
                                break
                    except aiohttp.ClientConnectorError:
                        pass
                    await anyio.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_BESIDE = Path(sys.prefix).parent / ".venv-sglang" / "bin" / "sglang-router"
SGLANG_ROUTER = shutil.which("sglang-router") or (str(_BESIDE) if _BESIDE.exists() else None)
ROUTERS: list[Router] = [plain_proxy, *([sglang_router] if SGLANG_ROUTER else [])]


@pytest.mark.parametrize("router", ROUTERS)
async def test_requests_go_through_the_router(broker: Broker, tmp_path: Path, router: Router) -> None:
    async with (
        Upstream(broker, "a", answers).running() as a,
        Upstream(broker, "b", answers).running() as b,
        router([a.url, b.url], tmp_path) as url,
        door(broker, upstream=url) as client,
    ):
        for _ in range(8):
            assert await post(client) == (200, good())
        assert (await post(client, input_ids=[320]))[0] == 400  # the servers' vocabulary holds for the router too
        [lineage] = await broker.lineage.look_up([tokens_digest([1, 2, 7, 8])])
    assert lineage is not None
    assert (len(a.bodies), len(b.bodies)) == (4, 4)


@pytest.mark.parametrize("router", ROUTERS)
async def test_a_router_without_servers_is_waited_for(broker: Broker, tmp_path: Path, router: Router) -> None:
    async with Upstream(broker, "a", answers).running() as server, router([server.url], tmp_path) as url:
        async with door(broker, upstream="http://127.0.0.1:1", patience_s=1.0) as client:
            status, answer = await post(client)
            assert (status, answer["error"]["code"]) == (503, 503)
        async with door(broker, upstream=url + "/") as client:
            assert (await post(client))[0] == 200


async def test_the_oldest_of_the_routers_servers_counts(broker: Broker, tmp_path: Path) -> None:
    await broker.weights.publish("main", WeightsEntry(6, 6, "file:///v", "0", 1, "F32", 0))
    async with (
        Upstream(broker, "a", answers).running() as server,  # serves version 4
        plain_proxy([server.url], tmp_path) as url,
        door(broker, upstream=url, max_lag=1, catch_up_s=0.0, patience_s=1.0) as late,
        door(broker, upstream=url, max_lag=2, catch_up_s=0.0) as client,
    ):
        assert (await post(client))[0] == 200
        assert (await post(late))[0] == 503

"""How an update goes, call by call, with a server that answers in SGLang's shape, and may misbehave."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiohttp import web
from published import make_model
from test_watcher import LOG, heartbeat_of

from lachesis.broker import Broker
from lachesis.inference.agent.sglang_process import ServerFailed, SGLangServer
from lachesis.inference.agent.update import Updates
from lachesis.inference.settings import AgentSettings
from lachesis.inference.versions.model_folder import read_model_folder
from lachesis.inference.versions.watcher import Loadable

pytestmark = pytest.mark.anyio

CONTROL = ("/pause_generation", "/update_weights_from_disk", "/weights_checker", "/continue_generation")


class Stub:
    """Keeps what it was asked; `answers` are (status, body) in the place of the usual ones, None for no answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, tuple[int, Any] | None] = {}
        self.running: list[int] = []  # requests, as each poll sees them; none afterwards
        self._info: dict[str, str] = {}

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        self.calls.append((request.path, body))
        if request.path == "/update_weights_from_disk":
            self._info = {"weight_version": body["weight_version"], "model_path": body["model_path"]}
        if request.path == "/flush_cache":
            return web.Response(status=400 if self.running and self.running.pop(0) else 200)
        usual: dict[str, Any] = {
            "/update_weights_from_disk": {"success": True},
            "/model_info": self._info,
            "/weights_checker": {"success": True, "per_engine_checksum": "c0ffee"},
        }
        found = self.answers.get(request.path, (200, usual.get(request.path, {})))
        if found is None:
            await anyio.sleep_forever()
        assert found is not None
        return web.json_response(found[1], status=found[0])

    def control(self) -> list[str]:
        return [path for path, _ in self.calls if path in CONTROL]


@asynccontextmanager
async def serving(stub: Stub, folder: Path) -> AsyncIterator[SGLangServer]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", stub.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    async with SGLangServer(argv, {}, f"http://{host}:{port}", folder / "log") as server:
        yield server
    await runner.cleanup()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Loadable:
    return Loadable(7, read_model_folder(make_model(tmp_path_factory.mktemp("model") / "v7")), 0.0)


def updates(broker: Broker, **settings: Any) -> tuple[Updates, list[str]]:
    states: list[str] = []
    return Updates(AgentSettings(**settings), broker, heartbeat_of(broker), states.append, LOG), states


async def test_retract(broker: Broker, wanted: Loadable, tmp_path: Path) -> None:
    stub, (update, states) = Stub(), updates(broker)
    async with serving(stub, tmp_path) as server:
        assert await update.apply(server, wanted)

    assert stub.control() == list(CONTROL)
    assert dict(stub.calls)["/pause_generation"] == {"mode": "retract"}
    assert dict(stub.calls)["/update_weights_from_disk"]["flush_cache"] is True
    assert states == ["updating", "ready"]
    assert not await broker.redis.exists(broker.keys.updating("main"))  # its turn has ended


async def test_in_place_keeps_the_cache_of_running_requests_unless_it_goes_back(
    broker: Broker, wanted: Loadable, tmp_path: Path
) -> None:
    stub, heartbeat = Stub(), heartbeat_of(broker)
    states: list[str] = []
    update = Updates(AgentSettings(update_mode="in_place"), broker, heartbeat, states.append, LOG)
    async with serving(stub, tmp_path) as server:
        keys = []
        for _ in range(2):
            assert await update.apply(server, wanted)
            keys.append(heartbeat.status.prefix_key)

    assert keys == ["7.1", "7.2"]  # the same version, loaded again, shares no prefixes with itself
    pauses = [body["mode"] for path, body in stub.calls if path == "/pause_generation"]
    flushes = [body["flush_cache"] for path, body in stub.calls if path == "/update_weights_from_disk"]
    assert (pauses, flushes) == (["in_place", "retract"], [False, True])


async def test_drain_waits_until_nothing_runs(broker: Broker, wanted: Loadable, tmp_path: Path) -> None:
    stub, (update, states) = Stub(), updates(broker, update_mode="drain")
    stub.running = [2, 1, 0, 1]
    async with serving(stub, tmp_path) as server:
        assert await update.apply(server, wanted)

    assert [path for path, _ in stub.calls].index("/pause_generation") == 4 + 4  # four in a row without any
    assert states == ["draining", "ready"]


async def test_it_waits_for_its_turn(broker: Broker, wanted: Loadable, tmp_path: Path) -> None:
    stub, (update, states) = Stub(), updates(broker, update_at_once=1)
    await broker.pools.take_turn("main", "another", 1, 60)
    async with serving(stub, tmp_path) as server:
        assert not await update.apply(server, wanted)
        assert (stub.calls, states) == ([], [])
        await broker.pools.end_turn("main", "another")
        assert await update.apply(server, wanted)


@pytest.mark.parametrize(("servers", "at_once"), [(1, 1), (2, 1), (3, 2), (8, 4)])
async def test_half_of_the_pool_may_update(
    broker: Broker, wanted: Loadable, tmp_path: Path, servers: int, at_once: int
) -> None:
    for number in range(servers - 1):
        await heartbeat_of(broker, f"s{number}").announce()
    for number in range(at_once):
        await broker.pools.take_turn("main", f"s{number}", servers, 60)
    stub, (update, _) = Stub(), updates(broker)
    async with serving(stub, tmp_path) as server:
        assert not await update.apply(server, wanted)
        await broker.pools.end_turn("main", "s0")
        assert await update.apply(server, wanted)


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        ("/pause_generation", (500, {}), "answered /pause_generation with 500"),
        ("/update_weights_from_disk", (200, {"success": False, "message": "no"}), "did not load version 7: no"),
        ("/update_weights_from_disk", None, "SGLang was paused for 0.9 s, all that its watchdog bears"),
        ("/model_info", (200, {"weight_version": "6"}), "given version 7 from .* and says that it has 6 from None"),
        ("/weights_checker", (400, {"success": False}), "answered /weights_checker with 400"),
    ],
)
async def test_on_any_doubt_the_server_is_not_continued(
    broker: Broker, wanted: Loadable, tmp_path: Path, path: str, answer: tuple[int, Any] | None, says: str
) -> None:
    stub, (update, states) = Stub(), updates(broker, sglang_args="--tp 1 --watchdog-timeout 1")
    stub.answers[path] = answer
    async with serving(stub, tmp_path) as server:
        with pytest.raises(ServerFailed, match=says):
            await update.apply(server, wanted)

    assert "/continue_generation" not in stub.control()
    assert states == ["updating"]
    assert not await broker.redis.exists(broker.keys.updating("main"))


async def test_an_sglang_without_a_weights_checker_has_no_checksum(
    broker: Broker, wanted: Loadable, tmp_path: Path
) -> None:
    stub, (update, _) = Stub(), updates(broker)
    stub.answers["/weights_checker"] = (404, {"detail": "Not Found"})
    async with serving(stub, tmp_path) as server:
        assert await update.apply(server, wanted)
        assert await server.checksum() == ""
        del stub.answers["/weights_checker"]
        assert await server.checksum() == "c0ffee"

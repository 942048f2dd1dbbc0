"""Front doors in the test's own process, and servers before them that fail in every way on command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import roles
from aiohttp import web

from lachesis.broker import Broker
from lachesis.broker.records.versions import ServerStatus
from lachesis.inference.gateway import app as front_door
from lachesis.inference.settings import FrontDoorSettings
from lachesis.service.logs import configure_logging

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
REQUEST = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}, "return_logprob": True}


def good(**meta: Any) -> dict[str, Any]:
    """An answer to REQUEST in SGLang's shape."""
    described = {
        "finish_reason": {"type": "length", "length": 2},
        "weight_version": "4",
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
    }
    return {"text": "ab", "output_ids": [7, 8], "meta_info": described | meta}


async def answers(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response(good())


async def describes(request: web.Request) -> web.Response:
    return web.json_response({"model_path": "m", "served_model_name": "main", "is_generation": True})


async def hangs_up(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


class Upstream:
    """A server in SGLang's shape that behaves as told: `script` holds one behaviour a call, the last one for all others."""

    def __init__(self, broker: Broker, name: str, *script: Answer) -> None:
        self.broker, self.name, self.script = broker, name, list(script)
        self.bodies: list[Any] = []
        self.url, self.version, self.prefix_key, self.rule = "", 4, "", "newest"
        self.on_get = describes

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":  # what a router asks of its workers
            return await self.on_get(request)
        body = await request.json()
        self.bodies.append(body)
        behave = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return await behave(request, body)

    async def report(self, state: str = "ready") -> None:
        await self.broker.registry.report(
            ServerStatus(
                server=self.name,
                pool="main",
                url=self.url,
                state=state,
                version=self.version,
                loading=-1,
                heartbeat=time.time(),
                vocab_size=320,
                prefix_key=self.prefix_key,
                rule=self.rule,
            )
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Upstream]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

        async def beat() -> None:
            while True:
                await self.report()
                await anyio.sleep(0.2)

        beating = asyncio.create_task(beat())
        try:
            yield self
        finally:
            beating.cancel()
            await runner.cleanup()


@asynccontextmanager
async def door(broker: Broker, **more: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A front door, and a client's session with it."""
    settings = FrontDoorSettings(**{"run": broker.keys.run, "patience_s": 20.0, **more})
    listener = roles.listener()
    stop = anyio.Event()
    frontend = front_door.FrontDoor(settings, broker, configure_logging("front-door"))
    serving = asyncio.create_task(front_door.serve(frontend, [listener], stop))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        try:
            yield client
        finally:
            stop.set()
            await client.close()
            await serving


async def post(client: aiohttp.ClientSession, path: str = "/generate", **body: Any) -> tuple[int, Any]:
    async with client.post(path, json=REQUEST | body) as response:
        return response.status, await response.json()

"""The one address of a pool of SGLang servers. Stateless: any number may serve the same pool.

What else SGLang offers is not passed on: /server_info, for one, shows its keys to whoever asks.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import uvicorn
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.stdlib import BoundLogger

from lachesis.broker import Broker, ConfigurationError
from lachesis.broker.keys import check_name
from lachesis.broker.logs import configure_logging
from lachesis.inference.generate import Generated, lineages
from lachesis.inference.pool import Pool
from lachesis.inference.ports import bind
from lachesis.inference.relay import Relay
from lachesis.inference.routes import GenerationRoute
from lachesis.inference.settings import FrontDoorSettings

REFRESH_S = 0.5
REFRESH_WAITING_S = 0.02  # while a request waits for a server
FOLLOW_S = 5.0  # one wait for a newer version
RETRY_S = 1.0  # while Redis is away
LINEAGE_S = 1.0  # an answer waits this long at most for its lineage to be kept
DRAIN_S = 30  # running requests have this long at the end
GENERATION = {"/generate": ["POST", "PUT"], "/v1/completions": ["POST"], "/v1/chat/completions": ["POST"]}


class FrontDoor:
    """Wires the parts: the pool, refreshed from Redis; the relay; the routes."""

    def __init__(self, settings: FrontDoorSettings, broker: Broker, log: BoundLogger) -> None:
        self._settings, self._broker, self._log = settings, broker, log
        self._pool = Pool()
        self._look_now = anyio.Event()
        self.relay = Relay(self._pool, settings.patience_s, lambda: self._look_now.set())
        self._lineage_lost = 0
        self.app = Starlette(
            routes=[
                *(
                    Route(path, GenerationRoute(path, self.relay, self.record), methods=methods)
                    for path, methods in GENERATION.items()
                ),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/healthz", self._health),
            ]
        )
        self.app.router.redirect_slashes = False

    def close(self) -> None:
        """Let nobody wait for a server any more."""
        self.relay.closing = True
        self._pool.wake()

    async def keep_pool(self) -> None:
        """Read the pool's servers from Redis until cancelled; while Redis is away, the last ones known serve on."""
        silent = False
        known: set[str] = set()
        while True:
            self._look_now = anyio.Event()
            try:
                statuses = await self._broker.parties.servers(self._settings.pool)
                self._pool.refresh(statuses, now=time.monotonic(), wall=time.time())
                silent = False
            except (RedisError, OSError) as error:
                if not silent:
                    self._log.warning("Redis does not answer; the servers known last serve on", error=str(error))
                silent = True
            able = {server.name for server in self._pool.able()}
            if able != known:
                self._log.info("servers", ready=" ".join(sorted(able)) or "none", pool=self._settings.pool)
                known = able
            if self.relay.waiting:
                await anyio.sleep(REFRESH_WAITING_S)
                continue
            with anyio.move_on_after(REFRESH_S):
                await self._look_now.wait()

    async def follow_versions(self) -> None:
        """Have new requests wait for a newly published version, for a moment, until cancelled.

        A generation begun just before its server loads the newest weights would reach the trainer a step late.
        """
        seen = -1
        while True:
            try:
                entry = await self._broker.weights.wait_newer(self._settings.policy, seen, FOLLOW_S)
            except (RedisError, OSError):
                await anyio.sleep(RETRY_S)
                continue
            if entry is not None:
                seen = entry.version
                self._pool.await_version(seen, time.monotonic() + self._settings.catch_up_s)

    async def record(self, body: Mapping[str, Any], generated: Sequence[Generated]) -> None:
        """Keep the lineage of an answer, so that it is there when the environment posts what it made of it."""
        found = lineages(body, generated)
        if not found:
            return
        with anyio.move_on_after(LINEAGE_S):
            try:
                await self._broker.lineage.record(found)
                return
            except (RedisError, OSError):
                pass
        self._lineage_lost += len(found)  # the answer is worth more; /health shows the count

    async def _models(self, request: Request) -> Response:
        model = {"id": self._settings.pool, "object": "model", "created": 0, "owned_by": "lachesis"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, request: Request) -> Response:
        """200 as long as requests are taken; whether they have to wait stands in the body."""
        return JSONResponse(
            {
                "status": "ok",
                "ready": len(self._pool.able()),
                "waiting": self.relay.waiting,
                "lineage_lost": self._lineage_lost,
            }
        )


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again after its shutdown, and the exit code would not be 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listener(settings: FrontDoorSettings) -> socket.socket:
    if settings.fd is None:
        return bind(settings.host, settings.port)
    try:
        return socket.socket(fileno=os.dup(settings.fd))
    except OSError as error:
        raise ConfigurationError(f"fd = {settings.fd}: not an inherited socket: {error.strerror}") from None


def _address(listener: socket.socket) -> str:
    name = listener.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)


async def serve(door: FrontDoor, listener: socket.socket, stop: anyio.Event) -> None:
    """Serve on the socket until `stop` is set and the running requests are done."""
    server = _Server(
        uvicorn.Config(
            door.app,
            http="httptools",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )
    )

    async def close() -> None:
        await stop.wait()
        door.close()
        server.should_exit = True

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.keep_pool)
            tasks.start_soon(door.follow_versions)
            tasks.start_soon(close)
            await server.serve(sockets=[listener])
            tasks.cancel_scope.cancel()
    finally:
        await door.relay.aclose()


async def _main(settings: FrontDoorSettings, url: str, listener: socket.socket, log: BoundLogger) -> None:
    broker = await Broker.connect(url, settings.run)
    stop = anyio.Event()

    async def stop_on_signal() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("draining", signal=number.name)
                stop.set()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop_on_signal)
            log.info("listening", address=_address(listener), pool=settings.pool)
            await serve(FrontDoor(settings, broker, log), listener, stop)
            tasks.cancel_scope.cancel()
    finally:
        await broker.aclose()
    log.info("stopped")


def run(settings: FrontDoorSettings) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns 0."""
    log = configure_logging("front-door")
    check_name("pool", settings.pool)
    with settings.redis() as url, _listener(settings) as listener:
        anyio.run(_main, settings, url, listener, log, backend_options={"use_uvloop": True})
    return 0

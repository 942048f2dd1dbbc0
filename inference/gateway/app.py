"""The one address of a pool of SGLang servers. Stateless: any number may serve the same pool.

What else SGLang offers is not passed on: /server_info, for one, shows its keys to whoever asks.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import anyio
import uvicorn
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.stdlib import BoundLogger

from lachesis.broker import Broker, ConfigurationError
from lachesis.broker.records.keys import check_name
from lachesis.inference.gateway.lineage import Lineages
from lachesis.inference.gateway.pool import Pool
from lachesis.inference.gateway.pool_watch import PoolWatch
from lachesis.inference.gateway.proxy import Proxy
from lachesis.inference.gateway.request_check import RequestCheck
from lachesis.inference.gateway.routes import GenerationRoute, Guard, refuse
from lachesis.inference.settings import FrontDoorSettings
from lachesis.service.http.access import ENVIRONMENT, Access
from lachesis.service.http.connections import uvicorn_options
from lachesis.service.http.urls import check_url
from lachesis.service.http.web_pages import guarded
from lachesis.service.logs import configure_logging
from lachesis.service.ports import bind

LINEAGE_S = 1.0  # an answer waits this long at most for its lineage to be kept
HTTP_DRAIN_S = 30  # running requests have this long at the end
ATROPOS_PORTS = range(9004, 9008)
GENERATION = {"/generate": ["POST", "PUT"], "/v1/completions": ["POST"], "/v1/chat/completions": ["POST"]}


class FrontDoor:
    """Wires the parts: the pool, refreshed from Redis; the relay; the routes."""

    def __init__(self, settings: FrontDoorSettings, broker: Broker, log: BoundLogger) -> None:
        self.settings, self._broker = settings, broker
        self._pool = Pool(settings.max_lag)
        self.watch = PoolWatch(self._pool, settings, broker, lambda: self.relay.waiting, log)
        self.relay = Proxy(self._pool, settings.patience_s, self.watch.look_now)
        self._lineage_lost = self._lineage_dropped = 0
        record = self.record if settings.lineage_bytes else None
        check = RequestCheck(settings.pass_fields.replace(",", " ").split())
        routes = [
            *(
                Route(
                    path,
                    GenerationRoute(
                        path, self.relay, record, check, settings.max_body_bytes, direct=not settings.upstream
                    ),
                    methods=methods,
                )
                for path, methods in GENERATION.items()
            ),
            Route("/v1/models", self._models),
        ]
        self.access = Access(broker, required=settings.require_tokens)
        for route in routes:
            route.app = Guard(route.app, self.access, ENVIRONMENT)
        routes += [Route("/health", self._health), Route("/healthz", self._health)]
        self.app = Starlette(routes=routes, middleware=guarded(settings, refuse))
        self.app.router.redirect_slashes = False

    def close(self) -> None:
        """Let nobody wait for a server any more."""
        self.relay.closing = True
        self._pool.wake()

    async def record(self, found: Lineages) -> None:
        """Keep the lineage of an answer, so that it is there when the environment posts what it made of it."""
        with anyio.move_on_after(LINEAGE_S):
            try:
                dropped = await self._broker.lineage.record(found, max_bytes=self.settings.lineage_bytes)
                self._lineage_dropped += dropped
                return
            except (RedisError, OSError):
                pass
        self._lineage_lost += len(found)  # the answer is worth more; /health shows the count

    async def _models(self, request: Request) -> Response:
        model = {"id": self.settings.pool, "object": "model", "created": 0, "owned_by": "lachesis"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, request: Request) -> Response:
        """200 as long as requests are taken; to who may read the run the body says whether they have to wait."""
        if not await self.access.may_read(request.headers.get("authorization", "")):
            return JSONResponse({"status": "ok"})
        return JSONResponse(
            {
                "status": "ok",
                "ready": len(self._pool.able()),
                "waiting": self.relay.waiting,
                "lineage_lost": self._lineage_lost,
                "lineage_dropped": self._lineage_dropped,
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


async def serve(door: FrontDoor, listeners: Sequence[socket.socket], stop: anyio.Event) -> None:
    """Serve on the sockets until `stop` is set and the running requests are done."""
    server = _Server(
        uvicorn.Config(
            door.app,
            **uvicorn_options(door.settings),
            log_level="error",
            server_header=False,
            timeout_graceful_shutdown=HTTP_DRAIN_S,
        )
    )

    async def close() -> None:
        await stop.wait()
        door.close()
        server.should_exit = True

    try:
        await door.access.prepare()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.watch.keep_pool)
            tasks.start_soon(door.watch.follow_versions)
            tasks.start_soon(close)
            await server.serve(sockets=list(listeners))
            tasks.cancel_scope.cancel()
    finally:
        await door.relay.aclose()


async def _main(settings: FrontDoorSettings, url: str, listeners: Sequence[socket.socket], log: BoundLogger) -> None:
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
            log.info("listening", address=" ".join(map(_address, listeners)), pool=settings.pool)
            await serve(FrontDoor(settings, broker, log), listeners, stop)
            tasks.cancel_scope.cancel()
    finally:
        await broker.aclose()
    log.info("stopped")


def run(settings: FrontDoorSettings) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns 0."""
    log = configure_logging("front-door")
    check_name("pool", settings.pool)
    check_name("policy", settings.policy)
    if settings.upstream:
        check_url("--upstream", settings.upstream)
    gc.freeze()  # what is imported stays: a collection, of which every few answers need one, need not look at it
    with settings.redis() as url, ExitStack() as open_sockets:
        more = [port for port in ATROPOS_PORTS if settings.atropos_ports and port != settings.port]
        listeners = [
            open_sockets.enter_context(listener)
            for listener in (_listener(settings), *(bind(settings.host, port) for port in more))
        ]
        settings = settings.on(listeners)
        anyio.run(_main, settings, url, listeners, log, backend_options={"use_uvloop": True})
    return 0

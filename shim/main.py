"""The process: a listening socket, uvicorn, and an end without lost requests."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import signal
import socket
import ssl
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from lachesis.broker import Broker, ConfigurationError
from lachesis.broker.records.keys import check_name
from lachesis.broker.store.connection import hide_password
from lachesis.service.http.connections import Policy, uvicorn_options
from lachesis.service.logs import configure_logging
from lachesis.shim.app import build_app
from lachesis.shim.http.delivery import Protocol
from lachesis.shim.settings import ShimSettings

HTTP_DRAIN_S = 20

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # options of mallopt(3)


def run(settings: ShimSettings) -> int:
    """Serve until SIGTERM or SIGINT; then finish the requests under way, for up to 20 s. Returns the exit code."""
    check_name("policy", settings.policy)
    check_certificate(settings)
    listener = listen(settings)
    settings = settings.on([listener])
    keep_freed_memory()
    with settings.redis() as url, asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(serve(settings, url, listener))
    return 0


class _Loop(uvloop.Loop):
    """uvloop's, where a TLS handshake may take as long as a request's head, which uvicorn has no setting for."""

    async def create_server(self, *arguments: Any, **named: Any) -> Any:
        if named.get("ssl"):
            named["ssl_handshake_timeout"] = Policy.head_s
        return await super().create_server(*arguments, **named)


def keep_freed_memory() -> None:
    """Have glibc keep what a body of some 100 KiB took for the next one.

    It gives the end of its heap back to the system as soon as it is free; to fault that in again, for every body, costs
    as much as to read the body.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20), (M_TOP_PAD, 4 << 20)):
            libc.mallopt(option, value)


async def serve(settings: ShimSettings, redis_url: str, listener: socket.socket) -> None:
    log = configure_logging("shim")
    broker = await Broker.connect(redis_url, settings.run)
    app = build_app(broker, settings, draining=lambda: server.should_exit)
    gc.collect()
    gc.freeze()  # what is there stays: a collection, while which all others wait, need not look at it
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            **uvicorn_options(settings, Protocol),
            log_config=None,
            timeout_graceful_shutdown=HTTP_DRAIN_S,
            backlog=1024,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it caught once more after it has drained
        signal.signal(number, _ignore)
    log.info(
        "listening",
        url=_url(listener, "https" if settings.tls_cert else "http"),
        run=settings.run,
        tokens="required" if settings.require_tokens else "of a run that has some",
        redis=hide_password(redis_url),
    )
    try:
        await server.serve(sockets=[listener])
    finally:
        await broker.aclose()
    log.info("stopped")


def listen(settings: ShimSettings) -> socket.socket:
    """The socket to serve on: the inherited one, or a new one. Raises ConfigurationError where there can be none."""
    if settings.fd is not None:
        try:
            return socket.socket(fileno=settings.fd)
        except OSError as error:
            raise ConfigurationError(f"fd = {settings.fd}: not an open socket ({error.strerror})") from None
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024, reuse_port=settings.reuse_port)
    except OSError as error:
        at = f"host = {settings.host!r}, port = {settings.port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"{at}: another program listens there; stop it, or give another --port") from None
        raise ConfigurationError(f"{at}: can't listen there ({error.strerror})") from None


def check_certificate(settings: ShimSettings) -> None:
    """Raise ConfigurationError for a certificate that can't be served with."""
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise ConfigurationError("--tls-cert and --tls-key need each other: give both, or neither")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(
            f"tls_cert = {str(cert)!r}, tls_key = {str(key)!r}: not the PEM files of a certificate and its key ({error})"
        ) from None


def _url(listener: socket.socket, scheme: str) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _ignore(_: int, __: FrameType | None) -> None:
    pass

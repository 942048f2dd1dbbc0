"""One policy for connections: what a peer may send, and how slowly, before anybody knows who it is.

httptools takes a head of any length and uvicorn waits for the rest of anything for ever. Here a head is bounded in
bytes, headers and time, a body comes at a least rate, an answer is taken at some rate, and there are so many
connections at most. Nothing of this touches a request that was read whole: it may wait as long as it likes.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lachesis.service.http.settings import ConnectionSettings

SWEEP_S = 1.0
PIECE_BYTES = 4 << 10  # so much is parsed at once where it may hold the heads of many requests,
CHUNKED_BYTES = 32 << 10  # and so much of a body whose length is not known
SPARE_DESCRIPTORS = 256  # for Redis, files and child processes


@dataclass(frozen=True)
class Policy:
    """What is asked of a peer."""

    max_connections: int = 4096
    head_bytes: int = 32 << 10  # of request line and headers together; also of what is neither head nor body
    headers: int = 100
    head_s: float = 10.0  # from a connection's begin, or a request's first byte, to the end of its headers
    body_s: float = 10.0  # in each such time, less what reading was paused,
    body_bytes: int = 10 << 10  # so much of a body comes, or its end
    answer_s: float = 120.0  # an answer of which nothing is taken for so long is not wanted
    keep_alive_s: float = 20.0  # between requests


class Connections:
    """The connections of one server."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.idle: dict[BoundedProtocol, None] = {}  # those without a request under way, the longest first
        self._open: set[BoundedProtocol] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._swept = 0.0

    def add(self, connection: BoundedProtocol) -> bool:
        """Count one more, in the place of the one that waits longest if need be. False if there is none."""
        if len(self._open) >= self.policy.max_connections:
            answered = (each for each in self.idle if not each.transport.get_write_buffer_size())
            if (longest := next(answered, None)) is None:
                return False
            longest.transport.abort()
            self.remove(longest)
        self._open.add(connection)
        self.idle[connection] = None
        if self._sweep is None:
            self._swept = connection.loop.time()
            self._sweep = connection.loop.call_later(SWEEP_S, self._look, connection.loop)
        return True

    def rest(self, connection: BoundedProtocol) -> None:
        """It has no request under way any more."""
        if connection in self._open:
            self.idle[connection] = None

    def remove(self, connection: BoundedProtocol) -> None:
        self._open.discard(connection)
        self.idle.pop(connection, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have every connection look at its clock; one timer for all costs less than one for each request."""
        now = loop.time()
        elapsed = min(now - self._swept, 2 * SWEEP_S)  # where this process itself was late, no peer is to blame
        self._swept = now
        for connection in list(self._open):
            connection.check(elapsed)
        self._sweep = loop.call_later(SWEEP_S, self._look, loop) if self._open else None


class _Flow(FlowControl):
    """Reading goes on only when what was read already is parsed."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, under a policy.

    Of requests that come before earlier ones are answered (pipelining) a few are parsed and the rest waits, unread as
    far as can be: none is lost, and none takes memory that was not asked for.
    """

    flow: _Flow

    def __init__(self, *arguments: Any, shared: Connections | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._shared = shared or Connections(Policy())
        self._policy = self._shared.policy
        self._held: list[memoryview] = []  # read, and not parsed yet
        self._unclaimed = 0  # bytes since the last that were a whole head, or of a body
        self._body_left = 0  # as Content-Length says
        self._chunked = self._in_body = self._begun = self._first = False
        self._clock = 0.0  # of the head, the body or the pause that is waited for
        self._received = 0  # of the body, since the clock began
        self._unsent, self._answer_clock = 0, 0.0
        self._refusal: tuple[int, str] | None = None

    # -- the transport's calls ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._first = True
        if not self._shared.add(self):
            self._refuse(503, f"{self._policy.max_connections} connections are open (max_connections)")

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.remove(self)
        self._held.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if not self._held and not self.flow.held and len(data) <= self._piece():
            self._feed(data)
            return
        self._held.append(memoryview(data))
        if not self.flow.held:
            self._parse()

    def _go_on(self) -> None:
        """The queue of requests is empty: what was held has its turn."""
        if not self.transport.is_closing():
            self.flow.held = False
            self.flow.resume_reading()
            self._parse()

    def _parse(self) -> None:
        """Parse what is held, until requests queue up."""
        while self._held and not self.transport.is_closing():
            data = self._held.pop(0)
            if (size := self._piece()) < len(data):
                self._held.insert(0, data[size:])
                data = data[:size]
            self._feed(data)
            if self.flow.held:
                return

    def _piece(self) -> int:
        """Bytes that the parser gets at once."""
        return max(CHUNKED_BYTES if self._chunked else PIECE_BYTES, self._body_left)

    def _feed(self, data: bytes | memoryview) -> None:
        self._unclaimed += len(data)
        super().data_received(data)  # type: ignore[arg-type]
        if self._unclaimed > self._policy.head_bytes:
            self._refusal = 431, f"the head has more than {self._policy.head_bytes} bytes"
            self.send_400_response("")
        if self.pipeline:
            self.flow.pause_reading()
            self.flow.held = True

    # -- the parser's calls ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun, self._clock = True, 0.0

    def on_headers_complete(self) -> None:
        size = len(self.url)
        self._body_left, self._chunked = 0, False
        for name, value in self.headers:
            size += len(name) + len(value)
            if name == b"content-length":
                self._body_left = int(value)
            elif name == b"transfer-encoding":
                self._chunked = True
        if len(self.headers) > self._policy.headers or size > self._policy.head_bytes:
            rule = f"at most {self._policy.headers} headers and {self._policy.head_bytes} bytes"
            self._refusal = 431, f"the head has {len(self.headers)} headers and {size} bytes: {rule}"
            raise ValueError(self._refusal[1])  # which the parser ends with
        self._shared.idle.pop(self, None)
        self._in_body, self._clock, self._received, self._unclaimed = True, 0.0, 0, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._received += len(body)
        self._body_left = max(0, self._body_left - len(body))
        self._unclaimed = 0
        self.take_body(body)

    def take_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._chunked = self._in_body = self._begun = self._first = False
        self._clock, self._unclaimed = 0.0, 0
        if self.cycle.response_complete:
            self._shared.rest(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.flow.held and len(self.pipeline) <= 1:  # its last request begins
            self.loop.call_soon(self._go_on)
        super().on_response_complete()
        if not self._in_body and not self._begun:
            self._clock = 0.0
            if self.cycle.response_complete and not self.pipeline:
                self._shared.rest(self)

    # -- its end --------------------------------------------------------------------------------------------------

    def check(self, elapsed: float) -> None:
        """Close what has kept this process waiting for too long, `elapsed` seconds after the last look."""
        policy = self._policy
        if unsent := self.transport.get_write_buffer_size():
            self._answer_clock = self._answer_clock + elapsed if unsent >= self._unsent else 0.0
            self._unsent = unsent
            if self._answer_clock > policy.answer_s:
                self.transport.abort()
            return
        self._unsent, self._answer_clock = 0, 0.0
        if self.flow.read_paused or self.transport.is_closing():
            return
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._in_body:
            if busy and self.cycle.waiting_for_100_continue:
                return
            self._clock += elapsed
            if self._clock <= policy.body_s:
                return
            if not busy:  # it is answered without its body
                self.transport.close()
            elif self._received < policy.body_bytes:
                self._refuse(408, f"of the body came less than {policy.body_bytes} bytes in {policy.body_s:.0f} s")
            self._clock, self._received = 0.0, 0
        elif self._begun or not busy:
            self._clock += elapsed
            if self._clock > (policy.head_s if self._begun or self._first else policy.keep_alive_s):
                self.send_400_response("") if busy else self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """End the connection, after the answers to what was asked well."""
        if self.cycle is not None and not self.cycle.response_complete and not self._in_body:
            self.cycle.keep_alive = False  # that of the last request
            self._held.clear()
            self.flow.pause_reading()
            self.flow.held = True
        else:
            self._refuse(*(self._refusal or (400, msg)))

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        silent = self.cycle is None or self.cycle.response_complete or not self.cycle.response_started
        if silent and not self.pipeline:  # nothing is in the midst of an answer
            head = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head % len(message) + message.encode("ascii"))
        self.transport.close()


def raise_descriptor_limit(connections: int) -> int:
    """Let this process have as many files open as so many connections need. Returns for how many there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - SPARE_DESCRIPTORS))


def uvicorn_options(settings: ConnectionSettings, protocol: type[BoundedProtocol] = BoundedProtocol) -> dict[str, Any]:
    """What uvicorn.Config is given. Raises the process's limit of open files as far as they need it."""
    connections = raise_descriptor_limit(settings.max_connections)
    policy = Policy(max_connections=connections, keep_alive_s=settings.keep_alive_s)
    return {
        "http": partial(protocol, shared=Connections(policy)),
        "ws": "none",
        "lifespan": "off",
        "access_log": False,
        "timeout_keep_alive": settings.keep_alive_s,
        "proxy_headers": bool(settings.forwarded_allow_ips),
        "forwarded_allow_ips": settings.forwarded_allow_ips or None,
    }

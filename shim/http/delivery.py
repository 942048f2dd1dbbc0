"""What ASGI keeps from an app and the connection knows.

Has a response really reached its reader? A peer that goes away with unread data in its socket resets the connection;
one that read everything closes it in order. So a reset after the last byte was written still tells that the response
was not read. That is only heard by who has not closed the connection first: one that ends with the response is closed
when the peer has.

And a body comes in pieces as large as the socket had them. To wake the app for each costs more than to copy them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

from starlette.types import Receive, Scope, Send

from lachesis.service.http.connections import BoundedProtocol

ON_CUT, IN_WHOLE, PIPELINED = "lachesis.on_cut", "lachesis.in_whole", "lachesis.pipelined"
PIECE_BYTES = 1 << 20


class Protocol(BoundedProtocol):
    """uvicorn's under our policy, plus three ASGI extensions.

    `lachesis.on_cut`: a list of functions to call if the response is cut off, and what keeps its connection open. `lachesis.in_whole`: a function after
    whose call the body comes whole, or in pieces of about PIECE_BYTES. `lachesis.pipelined`: there if the request came
    before the one before it was answered.
    """

    _on_cut: tuple[list[Callable[[], None]], ...] = ()  # of the requests whose responses may not have been read yet
    _parts: list[bytes]
    _in_whole = _cut = _ends = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client is None and transport.get_extra_info("socket").family != socket.AF_UNIX:
            transport.abort()  # the peer is gone already, and what it asked for is for nobody

    def on_message_begin(self) -> None:
        super().on_message_begin()
        pipelined = self.cycle is not None and not self.cycle.response_complete
        calls: list[Callable[[], None]] = []
        # the next request on a connection says that the response before it was read, unless that was not there yet
        self._on_cut = (*self._on_cut, calls) if pipelined else (calls,)
        self._parts, self._in_whole = [], False
        extensions = {
            ON_CUT: {"calls": calls},
            IN_WHOLE: {"call": self._gather},
            **({PIPELINED: {}} if pipelined else {}),
        }
        self.scope["extensions"] = cast(dict[str, dict[object, object]], extensions)

    def on_headers_complete(self) -> None:
        extensions = cast(dict[str, dict[str, object]], self.scope["extensions"])
        super().on_headers_complete()
        extensions[ON_CUT]["cycle"], extensions[ON_CUT]["end"] = self.cycle, self._end

    def data_received(self, data: bytes) -> None:
        if not self._ends:
            super().data_received(data)

    def _end(self) -> None:
        """Say that no more comes, and wait for the peer to close: as long as for its next request at most."""
        self._ends = True
        self.pipeline.clear()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def _gather(self) -> None:
        self._in_whole = True

    def take_body(self, body: bytes) -> None:
        if not self._in_whole:
            super().take_body(body)
            return
        self._parts.append(body)
        if sum(map(len, self._parts)) >= PIECE_BYTES:
            self._hand_over()

    def on_message_complete(self) -> None:
        self._hand_over()
        super().on_message_complete()

    def _hand_over(self) -> None:
        if self._parts:
            body, self._parts = b"".join(self._parts), []
            super().take_body(body)

    def eof_received(self) -> None:
        self._cut = self.transport.get_write_buffer_size() > 0
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        cut = self._cut or exc is not None
        super().connection_lost(exc)
        if cut:
            for calls in self._on_cut:
                for call in calls:
                    call()


class _Unclosed:
    """A request's transport, that is not closed after the response but by `end`."""

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self._transport, self.close = transport, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def on_cut(scope: Scope, call: Callable[[], None]) -> None:
    """Have `call` called if the peer is found to have gone away without reading the whole response."""
    if (extension := scope.get("extensions", {}).get(ON_CUT)) is not None:
        extension["calls"].append(call)
        if (cycle := extension.get("cycle")) and not isinstance(cycle.transport, _Unclosed):
            cycle.transport = _Unclosed(cycle.transport, extension["end"])


def is_pipelined(scope: Scope) -> bool:
    """Whether the request was sent before the response to the one before it on its connection was there to be read."""
    return PIPELINED in scope.get("extensions", {})


def in_whole(scope: Scope) -> None:
    """Have the request's body come whole, or in large pieces. Until this is called little of it is taken in."""
    if (extension := scope.get("extensions", {}).get(IN_WHOLE)) is not None:
        extension["call"]()


class Peer:
    """The other end of one request: `async with Peer(receive, send) as peer`, then send through it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.gone = False
        self._receive, self._send = receive, send

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, body: bytes, *, more: bool) -> bool:
        """Hand over part of the body. False if the peer has gone away."""
        if not self.gone:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        return not self.gone

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True

    async def __aenter__(self) -> Peer:
        self._watcher = asyncio.create_task(self._watch())
        await asyncio.sleep(0)  # a peer that left before we were ready is noticed here
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()

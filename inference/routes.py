"""The HTTP side of a generation: reading the request, answering as a whole or in pieces, noticing that the client left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lachesis.inference.generate import BadRequest, Generated, read_request
from lachesis.inference.relay import Relay, StreamBroken, Unanswered

MAX_BODY = 64 << 20  # bytes

Record: TypeAlias = Callable[[Mapping[str, Any], Sequence[Generated]], Awaitable[None]]


class GenerationRoute:
    """One path that servers answer, as an ASGI application.

    `record` is told of every generation whose answer is about to be sent.
    """

    def __init__(self, path: str, relay: Relay, record: Record) -> None:
        self._path, self._relay, self._record = path, relay, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = read_request(await _read(Request(scope, receive)))
        except ClientDisconnect:
            return
        except BadRequest as error:
            await _refusal(error)(scope, receive, send)
            return
        async with anyio.create_task_group() as tasks:

            async def cancel_when_client_leaves() -> None:
                await receive()
                tasks.cancel_scope.cancel()

            tasks.start_soon(cancel_when_client_leaves)
            await self._respond(body, scope, receive, send)
            tasks.cancel_scope.cancel()

    async def _respond(self, body: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        response: Response
        try:
            if body.get("stream"):
                sink = _Stream(send)
                answer = await self._relay.stream(self._path, body, sink)
                if answer is None:
                    await sink.finish()
                    return
            else:
                answer = await self._relay.answer(self._path, body)
                if answer.generated:
                    await self._record(body, answer.generated)
            response = Response(answer.content, answer.status, media_type=answer.media_type)
        except BadRequest as error:
            response = _refusal(error)
        except Unanswered as error:
            response = _error(error.status, str(error))
        except StreamBroken:
            return  # without an end: so the client sees that it is cut off
        await response(scope, receive, send)


class _Stream:
    """A response in pieces."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def start(self, status: int, media_type: str) -> None:
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read(request: Request) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY:
            raise BadRequest("body", f"more than {MAX_BODY} bytes", "too large")
        pieces.append(piece)
    return b"".join(pieces)


def _refusal(error: BadRequest) -> Response:
    return _error(400, str(error), field=error.field, value=error.value, rule=error.rule)


def _error(status: int, message: str, **more: object) -> Response:
    """OpenAI's shape of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status, **more}}, status)

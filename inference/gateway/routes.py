"""The HTTP side of a generation: reading the request, answering as a whole or in pieces, noticing that the client left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
from redis.exceptions import RedisError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lachesis.broker.records.body_limits import TooMany, check_json
from lachesis.broker.records.registrations import Role
from lachesis.inference.gateway.lineage import Lineages, StreamLineage, lineages, to_ask, without
from lachesis.inference.gateway.protocols.fan_out import merge, singles
from lachesis.inference.gateway.protocols.openai_stream import OpenAIStream
from lachesis.inference.gateway.protocols.sglang import BadRequest, read_request
from lachesis.inference.gateway.protocols.vllm import is_vllms, to_sglang, to_vllm
from lachesis.inference.gateway.proxy import Answer, Proxy, Served, StreamBroken, Unanswered
from lachesis.inference.gateway.request_check import RequestCheck
from lachesis.service.http.access import Access, Denied

MAX_CONTAINERS, MAX_VALUES = 100_000, 1_200_000  # of one request: it is decoded, and encoded, in a tenth of a second
INLINE_BYTES = 1 << 20  # what is larger is counted in a thread

Record: TypeAlias = Callable[[Lineages], Awaitable[None]]


class GenerationRoute:
    """One path that servers answer, as an ASGI application.

    `record` is told of every generation that is about to be sent, as far as its lineage is known. `direct`: the relay's
    servers are SGLang's own, and not a router that may ask another one each time.
    """

    def __init__(
        self,
        path: str,
        proxy: Proxy,
        record: Record | None,
        check: RequestCheck,
        max_body_bytes: int,
        *,
        direct: bool = True,
    ) -> None:
        self._path, self._proxy, self._record, self._check, self._direct = path, proxy, record, check, direct
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = self._check(self._path, read_request(await _read(Request(scope, receive), self._max_body_bytes)))
        except ClientDisconnect:
            return
        except TooMany as error:
            more = {"field": error.field, "value": error.value, "rule": error.rule}
            await _error(413, str(error), **more)(scope, receive, send)
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
            if is_vllms(self._path, body):
                answer = await self._whole(to_sglang(body))
                if answer.status == 200:
                    answer.content = to_vllm(body, answer.generated)
            elif body.get("stream"):
                sink, asked = self._sink(body, send)
                streamed = await self._proxy.stream(self._path, {**body, **asked}, sink)
                if streamed is None:
                    await sink.finish()
                    return
                answer = streamed
            else:
                answer = await self._whole(body)
            response = Response(answer.content, answer.status, media_type=answer.media_type)
        except BadRequest as error:
            response = _refusal(error)
        except Unanswered as error:
            response = _error(error.status, str(error))
        except StreamBroken:
            return  # without an end: so the client sees that it is cut off
        await response(scope, receive, send)

    def _sink(self, body: dict[str, Any], send: Send) -> tuple[_Stream, Mapping[str, Any]]:
        """Where the stream goes, and what to ask for so that it can be recorded."""
        if self._record is None or (self._path != "/generate" and not self._direct):
            return _Stream(send), {}
        if self._path == "/generate":
            return _GenerateStream(send, StreamLineage(body), self._record), {}
        stream = OpenAIStream(self._path, body)
        return _OpenAIStream(send, stream, self._record), stream.asked

    async def _whole(self, body: dict[str, Any]) -> Answer:
        """A complete answer, recorded."""
        if self._record is None:
            return await self._proxy.answer(self._path, body)
        asked = to_ask(self._path, body)
        parts, n = singles(self._path, body)
        if parts:
            answer = await self._all([{**part, **asked} for part in parts], n)
        else:
            answer = await self._proxy.answer(self._path, {**body, **asked})
        if answer.status == 200:
            if found := lineages(body, answer.generated):
                await self._record(found)
            answer.content = without(self._path, answer.content, asked, body)
        return answer

    async def _all(self, parts: Sequence[dict[str, Any]], n: int) -> Answer:
        """One answer of calls that are made at the same time; the first one that failed stands for all."""
        calls = [asyncio.ensure_future(self._proxy.answer(self._path, part)) for part in parts]
        try:
            answers = await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
        for answer in answers:
            if answer.status != 200:
                return answer
        content = merge([answer.content for answer in answers], n)
        return Answer(200, answers[0].media_type, content, [each for answer in answers for each in answer.generated])


class Guard:
    """Lets through who has one of `roles`."""

    def __init__(self, app: ASGIApp, access: Access, roles: Collection[Role]) -> None:
        self._app, self._access, self._roles = app, access, roles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._access.check(Headers(scope=scope).get("authorization", ""), self._roles)
        except Denied as error:
            refusal = _error(error.status, str(error))
            refusal.headers.update(error.headers)
            await refusal(scope, receive, send)
        except (RedisError, OSError) as error:
            await _error(503, f"Redis, which knows the tokens, does not answer: {error}")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Stream:
    """A response in pieces."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def prepare(self, served: Served) -> None:
        pass

    async def start(self, status: int, media_type: str) -> None:
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class _GenerateStream(_Stream):
    """Its generations are recorded before the piece that ends them is sent."""

    def __init__(self, send: Send, lineage: StreamLineage, record: Record) -> None:
        super().__init__(send)
        self._lineage, self._record = lineage, record

    async def write(self, piece: bytes) -> None:
        if found := self._lineage.pass_on(piece):
            await self._record(found)
        await super().write(piece)


class _OpenAIStream(_Stream):
    """Its outputs are recorded where one version made them, before the piece that completes their ids is sent."""

    def __init__(self, send: Send, stream: OpenAIStream, record: Record) -> None:
        super().__init__(send)
        self._stream, self._record = stream, record

    async def prepare(self, served: Served) -> None:
        self._served, self._before = served, await served()

    async def write(self, piece: bytes) -> None:
        sent, complete = self._stream.pass_on(piece)
        if complete and self._before is not None and await self._served() == self._before:
            for each in complete:
                each.meta_info.weight_version = str(self._before)
            await self._record(lineages({}, complete))
        if sent:
            await super().write(sent)


async def _read(request: Request, limit: int) -> bytes:
    """The body. Raises TooMany, for one that is too large, too."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise TooMany(f"more than {limit} bytes", "must not be larger than max_body_bytes")
        pieces.append(piece)
    body = b"".join(pieces)
    if size > INLINE_BYTES:
        await anyio.to_thread.run_sync(check_json, body, MAX_CONTAINERS, MAX_VALUES)
    else:
        check_json(body, MAX_CONTAINERS, MAX_VALUES)
    return body


def _refusal(error: BadRequest) -> Response:
    return _error(400, str(error), param=error.field, field=error.field, value=error.value, rule=error.rule)


def _error(status: int, message: str, **more: object) -> Response:
    """OpenAI's shape of an error; SGLang's own on /generate is its `message` alone."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status, **more}}, status)


def refuse(status: int, message: str) -> Response:
    return _error(status, message)

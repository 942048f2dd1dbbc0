"""One request's way to a server that answers it: pick, send, judge, and if need be try again elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar
from uuid import uuid4

import aiohttp
import anyio
import msgspec
from msgspec import Struct

from lachesis.inference.gateway.poison import REFUSED_S, Poison
from lachesis.inference.gateway.pool import NO_NEW_REQUESTS_S, Pool, Server
from lachesis.inference.gateway.prefix_cache import choose_key, is_stale, judges, with_key
from lachesis.inference.gateway.protocols.sglang import Generated, fault_of, is_single, prompt_key, read_answer
from lachesis.inference.gateway.request_check import check_vocabulary

CONNECT_S = 5.0
KEEPALIVE_S = 2.0  # below the 5 s after which SGLang closes an idle connection
ABORT_RETRY_S = 0.2
LOST_TIMES = 2  # servers lost under one request, after which it is taken for the cause
ALONE_S = 1.0  # a request under which a server was lost is the only such one on its next server for so long
NULL_TIMES = 3  # answers with null log-probs, after which the weights are taken for broken

T = TypeVar("T")
Served: TypeAlias = Callable[[], Awaitable[int | None]]  # the version that a server serves now, if it is known to grow


class Unanswered(Exception):
    """No server could answer within reason; `status` and the message are for the client."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class StreamBroken(Exception):
    """A stream ended early after its first piece had been passed on; it can't be repeated."""


class Answer(Struct):
    """A server's complete answer; `generated` where it is a 200."""

    status: int
    media_type: str
    content: bytes
    generated: list[Generated] = []


class Sink(Protocol):
    """Where a stream goes."""

    async def prepare(self, served: Served) -> None:
        """Called before the request goes out, each time it does; `served` asks that server."""

    async def start(self, status: int, media_type: str) -> None: ...

    async def write(self, piece: bytes) -> None: ...


class _Failed(Exception):
    """This attempt failed; another may not."""


class _Lost(_Failed):
    """The server can't be reached, or was lost; `running` if it had the request by then."""

    def __init__(self, message: str, *, running: bool) -> None:
        self.running = running
        super().__init__(message)


class Proxy:
    """Sends requests to the pool's servers. `refresh` is called when a call failed: the pool may have changed."""

    def __init__(self, pool: Pool, patience_s: float, refresh: Callable[[], None]) -> None:
        self._pool, self._patience_s, self._refresh = pool, patience_s, refresh
        self._poison = Poison()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),  # to look for cookies takes longer than to send a request
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        )
        self.waiting = 0  # requests without a server
        self.closing = False  # the front door stops: nobody waits for a server any more

    async def aclose(self) -> None:
        await self._session.close()

    async def answer(self, path: str, body: dict[str, Any]) -> Answer:
        """A complete answer, never an aborted one. Raises BadRequest or Unanswered."""
        nulls, stale = 0, False

        async def attempt(server: Server) -> Answer:
            nonlocal nulls, stale
            status, sure = server.status, time.monotonic() - server.changed_at < NO_NEW_REQUESTS_S and not stale
            key = choose_key(status, path, body, sure=sure)
            version: int | None = status.version
            if key not in ("", status.prefix_key):
                version = await self._version(server)
            async with self._call(server, path, with_key(body, key) if key else body) as response:
                answer = Answer(response.status, response.content_type, await response.read())
            if answer.status != 200:
                return answer
            fault = _judge(answer, path, body)
            if fault == "aborted":
                await anyio.sleep(ABORT_RETRY_S)
                raise _Failed(f"{server.name} aborted the request")
            if fault == "null":
                nulls += 1
                message = f"{server.name} answers with null log-probs: its weights are broken"
                if nulls >= NULL_TIMES:
                    raise Unanswered(502, message)
                raise _Failed(message)
            if judges(status, path, body) and (stale := is_stale(answer.generated, version)):
                raise _Failed(f"{server.name} went on from a prefix of other weights")
            return answer

        return await self._try(attempt, body)

    async def stream(self, path: str, body: dict[str, Any], sink: Sink) -> Answer | None:
        """Pass a stream on; an answer that is none, an error, is returned as a whole instead.

        Until its first piece a stream is tried again like any request. Raises StreamBroken when it ends early after
        that, besides BadRequest and Unanswered.
        """

        async def attempt(server: Server) -> Answer | None:
            started = False
            key = choose_key(server.status, path, body, sure=False)
            await sink.prepare(partial(self._served, server))
            try:
                async with self._call(server, path, with_key(body, key) if key else body) as response:
                    if response.status != 200:
                        return Answer(response.status, response.content_type, await response.read())
                    async for piece in response.content.iter_any():
                        if not started:
                            started = True
                            await sink.start(response.status, response.content_type)
                        await sink.write(piece)
            except _Lost as lost:
                if started:
                    self._give_up_on(server)
                    raise StreamBroken(str(lost)) from None
                raise
            return None

        return await self._try(attempt, body)

    async def _try(self, attempt: Callable[[Server], Awaitable[T]], body: dict[str, Any]) -> T:
        """Make attempts on servers that take requests until one succeeds or patience ends.

        A request under which a server was lost may be the cause. So it is tried once more, and without others of its
        kind, else each of them would lose its second server by the one that is.
        """
        deadline = anyio.current_time() + self._patience_s
        lost, last = 0, ""
        key = prompt_key(body)
        while True:
            server = await self._next_server(deadline, key, last, alone=lost > 0)
            key = None  # where it failed once, the prompt's other servers are as good
            if self._poison.refuses(body, anyio.current_time()):
                raise Unanswered(
                    502, f"{LOST_TIMES} servers were lost while they ran this prompt: it is refused for {REFUSED_S:g} s"
                )
            if server.status.vocab_size:
                check_vocabulary(body, server.status.vocab_size)
            try:
                with self._alone_on(server) if lost else nullcontext():
                    return await attempt(server)
            except _Lost as error:
                self._give_up_on(server)
                lost += error.running and server.status.state not in ("updating", "draining")  # then it's of that
                last = str(error)
                if lost >= LOST_TIMES:
                    self._poison.add(body, anyio.current_time())
                    raise Unanswered(502, f"{lost} servers were lost while they ran this request: {last}") from None
            except _Failed as failed:
                last = str(failed)

    @contextmanager
    def _alone_on(self, server: Server) -> Iterator[None]:
        """For a while no other request under which a server was lost is sent to this one."""
        server.suspect = suspect = object()

        def release() -> None:
            if server.suspect is suspect:
                server.suspect = None
                self._pool.wake()

        timer = asyncio.get_running_loop().call_later(ALONE_S, release)
        try:
            yield
        finally:
            timer.cancel()
            release()

    def _give_up_on(self, server: Server) -> None:
        self._pool.failed(server)
        self._refresh()

    async def _next_server(self, deadline: float, key: int | None, last: str, *, alone: bool) -> Server:
        """The next server that takes requests, waiting for one. Raises Unanswered at the deadline."""
        self.waiting += 1
        try:
            while True:
                if anyio.current_time() >= deadline:
                    why = f"; last: {last}" if last else ""
                    raise Unanswered(503, f"no server could answer within {self._patience_s:g} s{why}")
                if (server := self._pool.pick(key, alone=alone)) is not None:
                    return server
                self._refresh()
                if self.closing:
                    raise Unanswered(503, "this front door stops and no server is ready: send the request again")
                with anyio.move_on_after(deadline - anyio.current_time()):
                    await self._pool.wait_for_change()
        finally:
            self.waiting -= 1

    async def _served(self, server: Server) -> int | None:
        return await self._version(server) if server.status.rule == "newest" else None

    async def _version(self, server: Server) -> int | None:
        try:
            async with self._session.get(f"{server.url}/model_info") as response:
                version = (await response.json()).get("weight_version") if response.status == 200 else None
        except (aiohttp.ClientError, OSError, ValueError):  # what is wrong with it, the request will find out
            return None
        return int(version) if isinstance(version, str) and version.isdecimal() else None

    @asynccontextmanager
    async def _call(self, server: Server, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The server's response while it comes in. Raises _Lost if the server is lost, or refuses with a 503."""
        sent = {key: value for key, value in body.items() if key != "rid"}
        if is_single(body):
            sent["rid"] = uuid4().hex  # never the client's: SGLang refuses a live one, and aborts by prefix
        content, headers = msgspec.json.encode(sent), {"content-type": "application/json"}
        scope = anyio.CancelScope()
        server.calls.add(scope)
        try:
            with scope:
                async with self._session.post(server.url + path, data=content, headers=headers) as response:
                    if response.status == 503:
                        raise _Lost(f"{server.name} takes no requests", running=False)
                    yield response
        except (aiohttp.ClientError, OSError) as error:
            running = not isinstance(
                error, aiohttp.ClientConnectorError | TimeoutError
            )  # the only timeout is to connect
            raise _Lost(f"{server.name} was lost: {error or type(error).__name__}", running=running) from None
        finally:
            server.calls.discard(scope)
        if scope.cancelled_caught:
            raise _Lost(f"{server.name} has been silent for too long", running=True)


def _judge(answer: Answer, path: str, body: dict[str, Any]) -> str | None:
    """What is wrong with a 200, if anything; keeps its generations."""
    try:
        answer.generated = read_answer(path, answer.content)
        return fault_of(answer.generated, echo=bool(body.get("echo")))
    except msgspec.DecodeError as error:
        raise Unanswered(502, f"the server sent an answer that is not SGLang's: {error}") from None

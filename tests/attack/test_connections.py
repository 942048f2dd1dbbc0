"""Peers that send no end, too slowly or too much at once; and those beside them, who are served."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial

import anyio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lachesis.service.http import connections
from lachesis.service.http.connections import Connections, Policy, uvicorn_options
from lachesis.service.http.settings import ConnectionSettings
from lachesis.shim.http.delivery import Protocol

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0  # for what comes much sooner
QUICK = Policy(head_s=0.4, body_s=0.4, body_bytes=1000, answer_s=0.4, keep_alive_s=0.4)
SLOW = Policy(max_connections=5)


class Server:
    """An app under a policy, in the test's own loop."""

    def __init__(self, policy: Policy) -> None:
        self.shared = Connections(policy)
        self.go_on = asyncio.Event()
        self.longest_queue = 0
        self.gone: list[str] = []

    def app(self) -> Starlette:
        async def echo(request: Request) -> Response:
            """The length of the body, once it may be read."""
            queues = [len(each.pipeline) for each in self.shared._open]
            self.longest_queue = max(self.longest_queue, *queues)
            if "wait" in request.query_params:
                await self.go_on.wait()
            try:
                body = await request.body()
            except ClientDisconnect:
                self.gone.append(request.url.query)
                raise
            return PlainTextResponse(f"{request.url.query} {len(body)}")

        async def early(request: Request) -> Response:
            return PlainTextResponse("not wanted", 413)

        async def much(request: Request) -> Response:
            return PlainTextResponse(b"x" * (64 << 20))

        routes = [("/echo", echo), ("/early", early), ("/much", much)]
        return Starlette(routes=[Route(path, call, methods=["GET", "POST"]) for path, call in routes])

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        options = uvicorn_options(ConnectionSettings()) | {"http": partial(Protocol, shared=self.shared)}
        options["timeout_keep_alive"] = self.shared.policy.keep_alive_s
        server = uvicorn.Server(uvicorn.Config(self.app(), **options, log_config=None, timeout_graceful_shutdown=1))
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        sock = listener.sockets[0].dup()
        listener.close()
        self.port = sock.getsockname()[1]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [sock])
            with anyio.fail_after(PATIENCE_S):
                yield self
            self.go_on.set()
            server.should_exit = True

    def busy(self) -> int:
        """Connections with a request under way."""
        return sum(each.cycle is not None and not each.cycle.response_complete for each in self.shared._open)

    async def connect(self) -> Peer:
        return Peer(*await asyncio.open_connection("127.0.0.1", self.port))


class Peer:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> bool:
        """Whether it could be sent."""
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError:
            return False
        return True

    async def rest(self) -> bytes:
        """All that comes until the connection ends."""
        said = b""
        with contextlib.suppress(OSError):
            while part := await self._reader.read(1 << 20):
                said += part
        return said

    async def line(self) -> bytes:
        """The first line of an answer without a body."""
        return (await self._reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0]

    async def answer(self) -> bytes:
        head = await self._reader.readuntil(b"\r\n\r\n")
        (length,) = (int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
        return await self._reader.readexactly(length)

    async def ask(self, path: str, *headers: str, body: bytes = b"") -> bytes:
        assert await self.send(request(path, *headers, body=body))
        return await self.answer()

    def close(self) -> None:
        self._writer.close()


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SWEEP_S", 0.05)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def request(path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


HEADS = {
    "a request line without end": (b"GET /echo?", b"a" * 4000),
    "a header without end": (b"GET /echo HTTP/1.1\r\nHost: x\r\nX-A: ", b"a" * 4000),
    "headers without end": (b"GET /echo HTTP/1.1\r\nHost: x\r\n", b"".join(b"x%d: y\r\n" % i for i in range(400))),
    "trailers without end": (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-A: ", b"a" * 4000),
    "a chunk's extension without end": (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;a=", b"a" * 4000),
    "lines without a request": (b"\r\n", b"\r\n" * 2000),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
async def test_a_head_without_end(name: str) -> None:
    begin, more = HEADS[name]
    async with Server(Policy()).running() as server:
        peer = await server.connect()
        sent = len(begin)
        assert await peer.send(begin)
        while await peer.send(more):
            sent += len(more)
            assert sent < 8 << 20  # what the kernel takes in counts, too
        if "head" in name or "line " in name:
            other = await server.connect()
            await other.send(begin + more * 10)
            assert (await other.rest()).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([f"X-{number}: y" for number in range(97)], b"200"),  # and three more
        ([f"X-{number}: y" for number in range(98)], b"431"),
        (["X: " + "a" * 32_000], b"200"),
        (["X: " + "a" * 33_000], b"431"),
    ],
)
async def test_the_bounds_of_a_head(headers: list[str], status: bytes) -> None:
    async with Server(Policy()).running() as server:
        peer = await server.connect()
        assert await peer.send(request("/echo", *headers, "Connection: close"))
        assert (await peer.rest()).split(b" ")[1] == status


async def test_silence_is_ended_and_work_is_not() -> None:
    async with Server(QUICK).running() as server:
        busy = await server.connect()
        assert await busy.send(request("/echo?wait", body=b"x"))
        silent, partial_head, reused, slow = [await server.connect() for _ in range(4)]
        assert await partial_head.send(b"GET /echo HTTP/1.1\r\nHo")
        assert await reused.ask("/echo?a") == b"a 0"
        assert await slow.send(request("/echo?b", body=b"x" * 4000)[:-3990])
        assert [await each.rest() for each in (silent, partial_head, reused)] == [b""] * 3
        assert (await slow.rest()).startswith(b"HTTP/1.1 408 ")
        assert server.gone == ["b"]
        server.go_on.set()
        assert await busy.answer() == b"wait 1"


async def test_a_body_that_comes_at_some_rate_comes_whole() -> None:
    async with Server(QUICK).running() as server:
        peer = await server.connect()
        whole = request("/echo?a", body=b"x" * 40_000)
        for start in range(0, len(whole), 2000):  # over more than twice body_s
            assert await peer.send(whole[start : start + 2000])
            await asyncio.sleep(0.05)
        assert await peer.answer() == b"a 40000"


async def test_the_clock_stands_still_while_a_body_is_not_wanted_yet() -> None:
    async with Server(QUICK).running() as server:
        large, asking = await server.connect(), await server.connect()
        sending = asyncio.create_task(large.send(request("/echo?wait", body=b"x" * (16 << 20))))
        assert await asking.send(request("/echo?wait=2", "Expect: 100-continue", body=b"x" * 10)[:-10])
        await asyncio.sleep(4 * QUICK.body_s)
        server.go_on.set()
        assert await asking.line() == b"HTTP/1.1 100 Continue"
        assert await asking.send(b"x" * 10)
        assert await asking.answer() == b"wait=2 10"
        assert await large.answer() == b"wait %d" % (16 << 20)
        assert await sending


async def test_a_body_that_nobody_waits_for_and_an_answer_that_nobody_takes() -> None:
    async with Server(QUICK).running() as server:
        answered, reader = await server.connect(), await server.connect()
        assert await answered.send(request("/early", body=b"x" * 10_000)[:-1])
        assert b" 413 " in await answered.rest()
        reader._reader._limit = 1  # type: ignore[attr-defined]  # it reads nothing of its own accord
        assert await reader.send(request("/much"))
        await until(lambda: not server.shared._open)


async def test_the_longest_idle_makes_room() -> None:
    async with Server(SLOW).running() as server:
        busy = await server.connect()
        assert await busy.send(request("/echo?wait"))
        await until(lambda: server.busy() == 1)
        idle = [await server.connect() for _ in range(4)]
        for peer in idle:
            assert await peer.ask("/echo") == b" 0"
        more = [await server.connect() for _ in range(2)]
        assert [await peer.ask("/echo?c") for peer in more] == [b"c 0"] * 2
        assert [await peer.rest() for peer in idle[:2]] == [b""] * 2
        assert await idle[2].ask("/echo?d") == b"d 0"
        for peer in (*idle[2:], *more):
            assert await peer.send(request("/echo?wait"))
        await until(lambda: server.busy() == 5)
        late = await server.connect()
        assert b" 503 " in await late.rest()
        server.go_on.set()
        assert await busy.answer() == b"wait 0"


async def test_pipelined_requests_are_all_answered_in_order_and_wait_unparsed() -> None:
    async with Server(Policy()).running() as server:
        peer = await server.connect()
        count = 3000
        whole = b"".join(request(f"/echo?{number}", body=b"x" * (number % 50)) for number in range(count))
        sending = asyncio.create_task(peer.send(whole))
        assert [await peer.answer() for _ in range(count)] == [b"%d %d" % (n, n % 50) for n in range(count)]
        assert await sending
        assert server.longest_queue < 200


async def test_what_was_asked_before_a_mistake_is_answered() -> None:
    async with Server(Policy()).running() as server:
        peer = await server.connect()
        assert await peer.send(request("/echo?wait=1") + request("/echo?2", body=b"xy") + b"nonsense\r\n\r\n")
        await asyncio.sleep(0.1)
        server.go_on.set()
        said = await peer.rest()
        assert said.count(b"HTTP/1.1 200 ") == 2
        assert b"wait=1 0" in said
        assert said.endswith(b"2 2")


async def test_others_are_served_beside_many_that_are_slow() -> None:
    async with Server(Policy()).running() as server:
        idle = [await server.connect() for _ in range(300)]
        slow = [await server.connect() for _ in range(100)]
        for peer in slow:
            assert await peer.send(request("/echo", body=b"x" * 1000)[:-999])
        for number in range(100):
            peer = await server.connect()
            assert await peer.ask(f"/echo?{number}") == b"%d 0" % number
            peer.close()
        for peer in (*idle, *slow):
            peer.close()


def test_the_limit_of_open_files_is_raised() -> None:
    source = """
import resource
from lachesis.service.http.connections import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000))
print(raise_descriptor_limit(1000), *resource.getrlimit(resource.RLIMIT_NOFILE))
print(raise_descriptor_limit(4096), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 2000
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000", "1256", "2000", "1744", "2000", "2000"]

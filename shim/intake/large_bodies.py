"""Large bodies are read by processes of their own, so that nobody waits for them here.

A decoder holds the interpreter until it is done, and may take many times a body's size. What is large, or has many lists,
goes to one of two workers, which count before they decode, take ten times the body's memory at most, and hand back
arrays. Nothing that is nested is decoded here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import anyio.to_thread
import msgspec
import structlog
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from starlette.exceptions import HTTPException

from lachesis.broker.errors import InvalidGroup
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import to_scored, unpack
from lachesis.shim.errors import Malformed

INLINE_BYTES = 1 << 20  # what is not larger than this, decompressed, and
INLINE_LISTS = 20_000  # has no more lists and objects, is decoded at once
WORKERS = 2
MEMORY = 10  # times the body's size, or MEMORY_BYTES if that is more, is what a worker may take
MEMORY_BYTES = 64 << 20
READ_S = 240.0  # a worker that takes longer, its start included, is ended
LENGTH_BYTES = 8  # before each message to and from a worker

log = structlog.get_logger(role="shim")

# how C code ends that gets no memory and does not expect it
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)

Refusal = tuple[str, Any, str]  # as InvalidGroup's field, value and rule

_limiter: RunVar[CapacityLimiter] = RunVar("_limiter")


class Order(msgspec.Struct, array_like=True):
    """What a worker is to read: the body follows."""

    form: str
    max_lists: int
    bytes: int


class Reply(msgspec.Struct, array_like=True):
    """What it found: `groups` with a packed form or a refusal each, `malformed` details, a refusal, or `too much`."""

    kind: str
    told: bytes = b"null"  # as JSON: it may hold what MessagePack does not
    packed: Sequence[bytes] = ()
    envs: Sequence[int | None] = ()
    posted: Sequence[bytes] = ()  # the JSON of those refused


def too_much(size: int) -> Reply:
    rule = f"must not take more than {MEMORY} times as much memory to read"
    return Reply("too much", json.dumps(f"body = {size} bytes: {rule}").encode())


class Read(NamedTuple):
    """One group of a large body: packed and admitted, less the trainer's limits; or refused."""

    packed: bytes
    env: int | None = None
    refusal: Refusal | None = None
    posted: bytes = b""

    @property
    def reader(self) -> None:
        """None of this process: a worker has looked at what its own has read."""

    async def arrays(self) -> Group:
        """What is nested is in `packed` alone. Raises InvalidGroup if it is refused."""
        if self.refusal:
            raise InvalidGroup(*self.refusal)
        return await anyio.to_thread.run_sync(_arrays, self.packed)

    def json(self) -> bytes:
        """The group as it was posted, or another JSON that means the same."""
        return self.posted or to_json(unpack(self.packed))


def to_json(group: Group | ScoredGroup) -> bytes:
    scored = to_scored(group) if isinstance(group, Group) else group
    return json.dumps(msgspec.to_builtins(scored)).encode()


def is_large(body: bytes) -> bool:
    """Whether a body of JSON is not for the event loop to decode."""
    return len(body) > INLINE_BYTES or _holds_more(body, INLINE_LISTS)


def _holds_more(body: bytes, lists: int) -> bool:
    """Whether there are more opening brackets: few as a rule, and found at the speed of memchr(3), unlike a count."""
    for bracket in (b"[", b"{"):
        place = body.find(bracket)
        while place >= 0 and lists >= 0:
            lists -= 1
            place = body.find(bracket, place + 1)
    return lists < 0


async def read_apart(body: bytes, form: str, max_lists: int) -> list[Read]:
    """The groups in a body whose form is `group`, `groups` or `packed`.

    Raises Malformed, InvalidGroup, and HTTPException 413 where it has more than `max_lists` lists and objects, too many
    values, or would take too much memory; 503 where no worker lived long enough to tell.
    """
    order = Order(form, max_lists, len(body))
    reply = await anyio.to_thread.run_sync(_ask, order, body, abandon_on_cancel=True, limiter=_workers())
    told = json.loads(reply.told)
    match reply.kind:
        case "malformed":
            raise Malformed(told)
        case "invalid":
            raise InvalidGroup(*told)
        case "too much":
            raise HTTPException(413, told)
        case "died":
            raise HTTPException(503, "the process that read the body has died", headers={"Retry-After": "1"})
    return [Read(*each) for each in zip(reply.packed, reply.envs, told, reply.posted, strict=True)]


def _workers() -> CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(WORKERS)
        _limiter.set(limiter)
        return limiter


def _arrays(packed: bytes) -> Group:
    return unpack(packed, rest=False)


# -- the workers, as a thread sees them ------------------------------------------------------------------------------

_idle: list[subprocess.Popen[bytes]] = []


def _ask(order: Order, body: bytes) -> Reply:
    """A worker's reply; where one dies, perhaps of what it read before, another one's. Two that crash had too little memory."""
    ends = []
    for _ in range(2):
        with suppress(OSError):  # there is none to be had, or it is gone
            worker = _take()
            watch = threading.Timer(READ_S, worker.kill)
            watch.start()
            reply = None
            try:
                reply = _exchange(worker, msgspec.msgpack.encode(order), body)
            finally:
                watch.cancel()
                if reply is None:
                    worker.kill()  # too late for one that has crashed
                    ends.append(worker.wait())
            if reply is not None:
                _idle.append(worker)
                return reply
    log.warning("the processes that read a body have died", bytes=len(body), exit_codes=ends)
    if len(ends) == 2 and set(ends) <= {*CRASHES}:
        return too_much(len(body))
    return Reply("died")


def _exchange(worker: subprocess.Popen[bytes], order: bytes, body: bytes) -> Reply | None:
    """None if the worker has ended."""
    assert worker.stdin
    assert worker.stdout
    for part in (len(order).to_bytes(LENGTH_BYTES, "big"), order, body):
        worker.stdin.write(part)
    worker.stdin.flush()
    length = int.from_bytes(worker.stdout.read(LENGTH_BYTES), "big")
    answer = worker.stdout.read(length)
    return msgspec.msgpack.decode(answer, type=Reply) if answer and len(answer) == length else None


def _take() -> subprocess.Popen[bytes]:
    """A worker that waits, or a new one. Each ends when this process does: then its input ends."""
    while _idle:
        worker = _idle.pop()
        if worker.poll() is None:
            return worker
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lachesis.shim.intake.body_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

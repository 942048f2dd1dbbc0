"""A replica's heartbeat, in a process of its own: what a long step does to the replica's interpreter, it does not feel.

`python -m lachesis.trainer.elastic.heartbeat` reads lines of JSON from its parent: first `Settings`, then an id for each life of
the replica. It beats for the newest id while its parent runs, also where that can't say so itself; it is silent while
the parent is stopped; and when the parent is gone, which it sees at once, it takes the replica out, so that others need
not wait until it has been silent for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import msgspec
from redis.exceptions import RedisError

from lachesis.broker.client import Broker

STOPPED = "TtZX"  # process states of Linux: stopped, traced, dead
GO_S = 5.0  # for a child to take its replica out


class Settings(msgspec.Struct, frozen=True):
    url: str
    run: str
    policy: str
    every_s: float
    hold_s: float  # for which the writer lock outlives the last beat
    parent: int


class Heartbeat:
    """`with Heartbeat(…) as heartbeat:`; `beat_for` each new id; from the end of the block on it is no member."""

    def __init__(self, url: str, run: str, policy: str, *, every_s: float, hold_s: float) -> None:
        self._settings = Settings(url, run, policy, every_s, hold_s, os.getpid())
        self._child: subprocess.Popen[bytes] | None = None
        self._id = ""

    def __enter__(self) -> Heartbeat:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(GO_S)
        except subprocess.TimeoutExpired:  # Redis is away: the replica is evicted for its silence
            self._child.kill()
            self._child.wait()

    def beat_for(self, id_: str) -> None:
        self._id = id_
        self._tell(id_)

    def check(self) -> None:
        """Start the process again if it has died."""
        assert self._child is not None
        if self._child.poll() is not None:
            self._start()
            self._tell(self._id)

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "lachesis.trainer.elastic.heartbeat"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the replica, which then says goodbye
        )
        self._tell(self._settings)

    def _tell(self, line: Settings | str) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(msgspec.json.encode(line) + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:  # `check` starts another, and tells it
            return


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal. False where the system doesn't tell (it has no /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in STOPPED
    except (FileNotFoundError, ProcessLookupError):  # the latter where it goes while it is read
        return False


async def beat(lines: asyncio.StreamReader) -> None:
    """Until the parent is gone."""
    settings = msgspec.json.decode(await lines.readline(), type=Settings)
    broker = await Broker.connect(settings.url, settings.run)
    id_ = ""
    listening = asyncio.create_task(lines.readline())
    while True:
        await asyncio.wait([listening], timeout=settings.every_s)
        if listening.done():
            if not (line := listening.result()):
                break
            id_ = msgspec.json.decode(line, type=str)
            listening = asyncio.create_task(lines.readline())
        if id_ and not is_stopped(settings.parent):
            beating = asyncio.create_task(broker.members.beat(settings.policy, id_, hold_s=settings.hold_s))
            await asyncio.wait([beating, listening], return_when=asyncio.FIRST_COMPLETED)
            if not beating.done():  # Redis is away, and there is news
                beating.cancel()
            elif (error := beating.exception()) and not isinstance(error, RedisError):
                raise error  # but a beat that Redis did not hear is only that
    leaving = broker.members.evict(settings.policy, silent_s=86400, limits={id_: 0}, for_good=True)
    with contextlib.suppress(TimeoutError, RedisError):  # Redis is in trouble: it is evicted for its silence
        await asyncio.wait_for(leaving, GO_S)
    await broker.aclose()


async def _main() -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await beat(lines)


if __name__ == "__main__":
    asyncio.run(_main())

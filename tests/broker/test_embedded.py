"""A Redis of one's own: shared, durable, and gone with the process that started it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import anyio
import pytest
from scored import group

from lachesis.broker import Broker, Conflict, EmbeddedRedis, RedisUnreachable, embedded

pytestmark = pytest.mark.anyio

OWNER = """
import sys, time
from lachesis.broker import EmbeddedRedis
with EmbeddedRedis(sys.argv[1]) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""
GUEST = """
import asyncio, sys
from lachesis.broker import Broker, EmbeddedRedis
async def main(url):
    broker = await Broker.connect(url)
    print((await broker.queue.status()).accepted)
    await broker.aclose()
with EmbeddedRedis(sys.argv[1]) as server:
    assert server.pid is None
    asyncio.run(main(server.url))
"""


def answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return True
    except OSError:
        return False


async def accept(url: str, number: int) -> int:
    broker = await Broker.connect(url)
    await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0)
    accepted = (await broker.queue.status()).accepted
    await broker.aclose()
    return accepted


async def test_it_dies_with_a_killed_parent_and_keeps_its_data(tmp_path: Path) -> None:
    async with await anyio.open_process([sys.executable, "-c", OWNER, str(tmp_path)], stderr=None) as owner:
        assert owner.stdout is not None
        await owner.stdout.receive()
        here = EmbeddedRedis(tmp_path)
        assert await accept(here.url, 1) == 1
        owner.kill()
    deadline = time.monotonic() + 10
    while answers(here.socket):
        assert time.monotonic() < deadline, "the server outlived its parent"
        await anyio.sleep(0.02)
    with here as server:
        assert await accept(server.url, 2) == 2


async def test_a_second_process_joins_and_leaves_it_running(redis_server: EmbeddedRedis) -> None:
    assert await accept(redis_server.url, 1) == 1
    guest = await anyio.run_process([sys.executable, "-c", GUEST, str(redis_server.folder)])
    assert guest.stdout == b"1\n"
    assert await accept(redis_server.url, 2) == 2


async def test_what_was_accepted_survives_a_sigkill(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, config=["appendfsync always"]) as server:  # docs/redis.md: what everysec may lose
        assert await accept(server.url, 1) == 1
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
    with EmbeddedRedis(tmp_path) as server:
        assert await accept(server.url, 2) == 2


async def test_a_long_folder_still_gets_a_socket(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / ("long" * 20) / ("path" * 20)) as server:
        assert await accept(server.url, 1) == 1
        assert len(str(server.socket)) < 108


def test_a_server_that_does_not_start_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(RedisUnreachable, match=f"did not start; its log is {tmp_path}/redis.log"):
        EmbeddedRedis(tmp_path, server="/bin/false").start()


async def test_who_insists_on_a_server_of_its_own_is_told_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "OWN_S", 0.2)
    with EmbeddedRedis(tmp_path), pytest.raises(Conflict, match="another process runs the Redis in"):
        EmbeddedRedis(tmp_path, shared=False).start()


async def test_a_killed_server_is_revived_with_its_data(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, config=["appendfsync always"]) as server:
        assert await accept(server.url, 1) == 1
        assert not server.revive()
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await anyio.to_thread.run_sync(os.waitid, os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        assert server.revive()
        assert await accept(server.url, 2) == 2

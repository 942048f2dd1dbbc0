"""A Redis of one's own: shared, durable, and gone with the process that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest
from anyio.abc import Process
from scored import group
from sick_redis import until

from lachesis.broker import Broker, Conflict, EmbeddedRedis, RedisUnreachable
from lachesis.broker.store import aof, embedded
from lachesis.broker.store.connection import open_redis
from lachesis.broker.store.embedded import Keeper

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

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


SHARER = """
import sys, time
from lachesis.broker.store.embedded import EmbeddedRedis, Keeper
with EmbeddedRedis(sys.argv[1]) as server, Keeper(server):
    print(server.pid or 0, flush=True)
    time.sleep(600)
"""


async def sharer(folder: Path) -> tuple[Process, int]:
    """A process that shares the folder's server, and the process id of the server if it runs it."""
    process = await anyio.open_process([sys.executable, "-c", SHARER, str(folder)], stderr=None)
    assert process.stdout is not None
    return process, int(await process.stdout.receive())


async def accepts(url: str, number: int) -> bool:
    with contextlib.suppress(RedisUnreachable):
        return await accept(url, number) == number
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_whoever_shares_the_folder_takes_the_server_over(tmp_path: Path, how: signal.Signals) -> None:
    (owner, pid), (guest, none) = await sharer(tmp_path), await sharer(tmp_path)
    async with owner, guest:
        assert (pid > 0, none) == (True, 0)
        url = EmbeddedRedis(tmp_path).url
        assert await accept(url, 1) == 1
        owner.send_signal(how)
        await owner.wait()
        await until(lambda: accepts(url, 2))
        guest.kill()


async def restarted(keeper: Keeper) -> bool:
    return keeper.restarts == 1


async def test_who_runs_the_server_starts_it_again(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, Keeper(server) as keeper:
        broker = await Broker.connect(server.url)
        assert await accept(server.url, 1) == 1
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert await broker.ping()  # it waits meanwhile
        await until(lambda: restarted(keeper))  # it counts once the server answers
        assert await accept(server.url, 2) == 2
        await broker.aclose()


async def test_a_server_that_cannot_be_started_again_ends_its_owner_with_the_reason(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lachesis.cli.main",
        "shim",
        "--embedded",
        "--state-dir",
        str(tmp_path),
        "--port",
        "0",
    ]
    async with await anyio.open_process(command, stderr=subprocess.STDOUT) as shim:
        assert shim.stdout is not None
        said = b""
        while b"listening" not in said:
            said += await shim.stdout.receive()
        folder = tmp_path / "redis"
        (folder / aof.AOF_FOLDER / aof.AOF_MANIFEST).write_text("no manifest")
        os.kill(await pid_of(folder), signal.SIGKILL)
        said = b"".join([part async for part in shim.stdout])
        assert await shim.wait() == 1
    last = said.decode().splitlines()[-1]
    assert last.startswith(
        f"lachesis shim: the embedded Redis in {folder} did not start; its log is {folder}/redis.log: "
    )


async def pid_of(folder: Path) -> int:
    redis = open_redis(EmbeddedRedis(folder).url)
    pid = int((await redis.info("server"))["process_id"])
    await redis.aclose()
    return pid


def newest_file(folder: Path) -> Path:
    return max((folder / aof.AOF_FOLDER).glob("*.incr.aof"))


@pytest.mark.parametrize("zeros", [1, 4096, (1 << 20) + 5])
async def test_zeros_at_the_end_of_the_file_are_cut_off(tmp_path: Path, zeros: int) -> None:
    with EmbeddedRedis(tmp_path) as server:
        assert await accept(server.url, 1) == 1
    with open(newest_file(tmp_path), "ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$100\r\nhalf" + bytes(zeros))  # a write of which a part came
    with EmbeddedRedis(tmp_path) as server:
        assert await accept(server.url, 2) == 2


async def test_a_file_that_ends_in_something_else_is_refused_with_what_mends_it(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        assert await accept(server.url, 1) == 1
    with open(newest_file(tmp_path), "ab") as file:
        file.write(b"garbage")
    with pytest.raises(RedisUnreachable, match="did not start; its log is") as error:
        EmbeddedRedis(tmp_path).start()
    _, _, repair = str(error.value).partition("cut that off with: ")
    await anyio.run_process(repair, input=b"y\n", stdout=None)
    with EmbeddedRedis(tmp_path) as server:
        assert await accept(server.url, 2) == 2

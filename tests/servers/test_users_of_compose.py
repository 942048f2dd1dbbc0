"""The users that containers get: a server that is killed under them comes back with all that it acknowledged."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port
from redis import AuthenticationError, Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from lachesis.cli.main import main

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def running(server: str, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "")
    users = folder / "users/redis/users.acl"
    command = [server, *options, "--aclfile", str(users), "--appendonly", "yes", "--appendfsync", "always"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_server_loses_no_transaction_and_knows_nobody_without_a_password(
    server_binary: str, tmp_path: Path
) -> None:
    port = free_port()
    assert main(["redis-users", "--to", str(tmp_path / "users"), "--address", f"redis://127.0.0.1:{port}/0"]) == 0
    password = (tmp_path / "users/redis/admin").read_text()
    patient = Retry(ConstantBackoff(0.1), 100)
    with Redis(port=port, username="admin", password=password, retry=patient) as redis:
        with running(server_binary, tmp_path, port) as process:
            redis.ping()
            with redis.pipeline(transaction=True) as pipe:
                pipe.set("a", 1).set("b", 2).execute()
            redis.eval("redis.call('SET', 'c', 3) redis.call('SET', 'd', 4)", 0)
            with Redis(port=port, protocol=2) as nobody, pytest.raises(AuthenticationError):
                nobody.ping()
            process.send_signal(signal.SIGKILL)
            process.wait()
        with running(server_binary, tmp_path, port):
            assert sorted(redis.keys()) == [b"a", b"b", b"c", b"d"]

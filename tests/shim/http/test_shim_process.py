"""`lachesis shim` as a process: killed, stopped, restarted behind its socket, misconfigured."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest
from commands import python
from ports import free_port
from trajectories import TRAINER, group, number_of, shim_process, wait_until_up

from lachesis.broker import EmbeddedRedis


@pytest.fixture
def listener() -> socket.socket:
    """A socket that outlives the shims behind it, as a supervisor holds it."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    listener.set_inheritable(True)
    return listener


@pytest.fixture
def address(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_shim_killed_between_requests_loses_nothing_it_accepted(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, listener: socket.socket, address: str
) -> None:
    log, fd = tmp_path / "log", listener.fileno()
    arguments = ("--redis-url", shared_redis.url, "--run", run_name, "--fd", str(fd))
    with shim_process(log, *arguments, inherit=(fd,)) as first:
        wait_until_up(address, first, log)
        httpx.post(f"{address}/register", json=TRAINER).raise_for_status()
        for number in range(4):
            assert httpx.post(f"{address}/scored_data", json=group(number)).json() == {"status": "received"}
        assert [number_of(item) for item in httpx.get(f"{address}/batch").json()["batch"]] == [0, 1]
        env = {"max_token_length": 64, "desired_name": "sums", "weight": 1.0, "group_size": 2}
        assert httpx.post(f"{address}/register-env", json=env).json()["env_id"] == 0
        first.kill()
        first.wait()

    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(httpx.get(f"{address}/status", timeout=30)))
    waiting.start()  # while nobody serves: it waits in the socket's backlog
    with shim_process(log, *arguments, inherit=(fd,)) as second:
        waiting.join()
        assert answers[0].json() == {"current_step": 1, "queue_size": 2}
        assert httpx.request("GET", f"{address}/status-env", json={"env_id": 0}).json()["queue_size"] == 2
        assert httpx.post(f"{address}/scored_data", json=group(3)).json()["status"] == "duplicate"
        assert [number_of(item) for item in httpx.get(f"{address}/batch").json()["batch"]] == [2, 3]
        assert httpx.get(f"{address}/batch").json() == {"batch": None}
        second.send_signal(signal.SIGTERM)
        assert second.wait(15) == 0
    assert log.read_text().count("listening") == 2
    assert address in log.read_text()
    assert log.read_text().count("\n") == 3  # two starts, one end, no access log
    listener.close()


def test_sigterm_answers_what_waits_and_ends(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, listener: socket.socket, address: str
) -> None:
    log, fd = tmp_path / "log", listener.fileno()
    arguments = ("--redis-url", shared_redis.url, "--run", run_name, "--fd", str(fd), "--queue-quota-bytes", "1")
    with shim_process(log, *arguments, inherit=(fd,)) as shim:
        wait_until_up(address, shim, log)
        httpx.post(f"{address}/scored_data", json=group(1)).raise_for_status()
        answers: list[httpx.Response] = []
        held = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{address}/scored_data", json=group(2), timeout=30))
        )
        held.start()
        held.join(0.5)
        assert held.is_alive()
        shim.send_signal(signal.SIGTERM)
        assert shim.wait(15) == 0
        held.join()
    assert answers[0].status_code == 503
    assert "this process is stopping" in answers[0].json()["detail"]
    listener.close()


def failing(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    log = tmp_path / "log"
    with shim_process(log, *arguments) as shim:
        code = shim.wait(20)
    return code, log.read_text()


def test_what_cannot_start_says_why_in_one_line(shared_redis: EmbeddedRedis, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = failing(tmp_path, "--redis-url", shared_redis.url, "--port", str(port))
    assert code == 2
    assert said.startswith("lachesis shim: host = '127.0.0.1', port = ")
    assert "another program listens there" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--redis-url", "unix:///nowhere", "--fd", "77"), "fd = 77: not an open socket"),
        (("--redis-url", "redis://127.0.0.1:1/0", "--port", "0"), "no Redis answers at redis://127.0.0.1:1/0"),
        (("--redis-url", "unix:///nowhere", "--port", "0", "--policy", "a b"), "policy = 'a b'"),
        (("--port", "0"), "which Redis?"),
    ],
)
def test_wrong_settings_say_why_in_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, said = failing(tmp_path, *arguments)
    assert code in (1, 2)
    assert message in said
    assert said.count("\n") == 1


def test_a_collection_need_not_look_at_what_was_there_at_the_start(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path
) -> None:
    """It stops everybody who is served: for a tenth of a second where it looks at all that was imported."""
    arguments = ["shim", "--redis-url", shared_redis.url, "--run", run_name, "--port", str(port := free_port())]
    code = f"import gc; from lachesis.cli.main import main; main({arguments}); print(gc.get_freeze_count())"
    log = tmp_path / "log"
    with open(log, "ab") as output, python.start("-c", code, stdout=output, stderr=output, cwd=tmp_path) as shim:
        wait_until_up(f"http://127.0.0.1:{port}", shim, log)
        shim.send_signal(signal.SIGTERM)
        assert shim.wait(15) == 0
    assert int(log.read_text().split()[-1]) > 50_000

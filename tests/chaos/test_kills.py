"""The demo, with every kind of process killed by SIGKILL in the middle: it recovers by itself, and the audit is clean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.loop, pytest.mark.sglang, pytest.mark.verl, pytest.mark.timeout(1200)]

VICTIMS = ("trainer", "shim", "sglang", "redis", "env", "front-door", "inference-0")


class Up:
    """A running `lachesis up`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.state = ("--state-dir", str(folder / "state"))
        self.log = folder / f"up-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "lachesis.cli.main", "up", *self.state]
        command += ["--shim-port", "0", "--front-door-port", "0", *options]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def read(self, command: str) -> dict[str, object]:
        arguments = [sys.executable, "-m", "lachesis.cli.main", command, *self.state, "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def step(self) -> int:
        if self.process.poll() is None and not (self.folder / "state" / "redis" / "redis.sock").exists():
            return 0  # still starting: asking now would start its Redis for it
        arguments = [sys.executable, "-m", "lachesis.cli.main", "status", *self.state, "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
        newest = json.loads(done.stdout)["newest_step"] if done.stdout else None  # else there is no run yet
        return int(newest["step"]) if isinstance(newest, dict) else 0

    def wait_for_step(self, step: int, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.step() < step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"step {step} was not reached:\n{self.log.read_text()}"
            time.sleep(0.5)

    def pid_of(self, part: str) -> int:
        """Process id of a part, found by its command line below ours."""
        for pid in descendants(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if part == "redis":
                if words[0].endswith(("valkey-server", "redis-server")) or words[0].split()[0].endswith("-server"):
                    return pid
            elif part == "sglang":
                if any(word.endswith("inference/launch.py") for word in words):
                    return pid
            elif "lachesis.cli.main" in words and words[words.index("lachesis.cli.main") + 1] == part.removesuffix(
                "-0"
            ):
                return pid
        raise LookupError(part)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, parents first."""
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        todo += (below := children.get(todo.pop(0), []))
        found += below
    return found


def test_any_process_may_be_killed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    steps = 150 if request.config.getoption("--chaos-long") else 40
    up = Up(tmp_path, "--steps", str(steps))
    try:
        for index, victim in enumerate(VICTIMS):
            up.wait_for_step(3 + index * (steps - 8) // len(VICTIMS))
            os.kill(up.pid_of(victim), signal.SIGKILL)
        up.process.wait(600)
        said = up.log.read_text()
        assert up.process.returncode == 0, said
        assert up.step() == steps, said
        report = up.read("audit")
        assert report["clean"], report
        assert report["steps"] == steps
        assert report["newest_version"] == steps
    finally:
        up.stop()


def test_a_killed_run_leaves_nothing_running_and_resumes(tmp_path: Path) -> None:
    up = Up(tmp_path, "--steps", "12")
    try:
        up.wait_for_step(4)
        below = descendants(up.process.pid)
        assert below
        up.process.kill()
        up.process.wait()
        deadline = time.monotonic() + 60  # the trainer finishes its step and waits for the Redis that is gone
        while alive := [
            pid for pid in below if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        ]:
            assert time.monotonic() < deadline, f"still running: {alive}"
            time.sleep(0.2)
        again = Up(tmp_path, "--steps", "12")
        again.process.wait(300)
        assert again.process.returncode == 0, again.log.read_text()
        report = again.read("audit")
        assert report["clean"], report
        assert report["steps"] == 12
    finally:
        up.stop()


def test_ctrl_c_drains_and_the_same_command_goes_on(tmp_path: Path) -> None:
    up = Up(tmp_path, "--steps", "12")
    up.wait_for_step(3)
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(90) == 130
    said = up.log.read_text()
    assert "interrupted: step" in said
    assert not descendants(up.process.pid)
    before = up.step()
    assert 3 <= before < 12

    again = Up(tmp_path, "--steps", "12")
    again.process.wait(300)
    assert again.process.returncode == 0, again.log.read_text()
    assert again.read("audit")["clean"]
    done = Up(tmp_path, "--steps", "12")
    assert done.process.wait(60) == 0
    assert "has its 12 steps already" in done.log.read_text()

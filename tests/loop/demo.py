"""`lachesis up` as a process, looked at from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from commands import lachesis
from redis import Redis
from redis.exceptions import RedisError

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.steps import LedgerEntry

PATIENCE_S = 600.0  # for whatever a busy machine is slow with; only what never comes takes so long
SEED = 1
FIRST_STEPS = 3  # of the run that makes the base model for all
MODEL = f"models/tiny-{SEED}"  # the base model, in a state folder
LEDGER = "lachesis:{default}:ledger:main"


@dataclass
class Outcome:
    """What a run leaves in its streams."""

    ledger: list[LedgerEntry]
    held_out: list[float]
    versions: list[int]  # published


class Demo:
    """A running `lachesis up` with its state in `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.redis = folder, EmbeddedRedis(folder / "redis")
        self.log = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "lachesis.cli.main", "up", "--state-dir", str(folder), "--seed", str(SEED)]
        command += ["--shim-port", "0", "--front-door-port", "0", *options]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def end(self, status: int = 0) -> str:
        """Wait for its end, which is to have this exit status; what it said."""
        assert self.process.wait(PATIENCE_S) == status, self.said
        return self.said

    def step(self) -> int:
        """The newest committed step; 0 before the first and while Redis does not answer."""
        with contextlib.suppress(RedisError), Redis(unix_socket_path=str(self.redis.socket)) as redis:
            for name, _ in redis.xrevrange(LEDGER, count=1):
                return int(name.partition(b"-")[0])
        return 0

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, f"step {step}")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"{what} never came:\n{self.said}"
            time.sleep(0.1)

    def pid_of(self, part: str) -> int:
        """Process id of a part, found by its command line below ours."""
        for pid in descendants(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if part == "redis":
                if words[0].split()[0].endswith("-server"):
                    return pid
            elif part == "sglang":
                if any(word.endswith("inference/agent/launcher.py") for word in words):
                    return pid
            elif "lachesis.cli.main" in words and words[words.index("lachesis.cli.main") + 1] == part:
                return pid
        raise LookupError(part)

    def kill(self) -> None:
        """All of it, if it still runs."""
        if self.process.poll() is None:
            below = descendants(self.process.pid)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


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


def audited(folder: Path) -> dict[str, Any]:
    """What `lachesis audit` says of the run in that folder, which nothing runs any more."""
    done = lachesis("audit", "--embedded", "--state-dir", str(folder), "--json")
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def outcome(folder: Path) -> Outcome:
    """What the run in that folder left in its streams; nothing runs there any more."""

    async def read() -> Outcome:
        broker = await Broker.connect(server.url)
        ledger = [entry async for entry in broker.queue.ledger("main")]
        entries = await broker.journal.metrics()
        held_out = [float(fields["accuracy"]) for _, fields in entries if fields["kind"] == "eval"]
        published = await broker.redis.xrange(broker.keys.weights("main"))
        await broker.aclose()
        return Outcome(ledger, held_out, [int(fields[b"version"]) for _, fields in published])

    with EmbeddedRedis(folder / "redis") as server:
        return anyio.run(read)

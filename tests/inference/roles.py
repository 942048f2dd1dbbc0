"""The room's two roles as processes of their own, as a user has them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 120.0  # far more than a busy machine needs
RUN = """
import sys
from lachesis.inference.{module} import run
from lachesis.inference.settings import {settings}
sys.exit(run({settings}(_cli_parse_args=sys.argv[1:])))
"""


class Role:
    """One process; `log` is what it wrote."""

    def __init__(self, module: str, settings: str, log: Path, *arguments: str, inherit: socket.socket | None = None):
        self.log = log
        fds = [inherit.fileno()] if inherit is not None else []
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN.format(module=module, settings=settings), *arguments],
                stdout=file,
                stderr=file,
                pass_fds=fds,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit code; -9 where it doesn't end within `PATIENCE_S`."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode


def agent(log: Path, *arguments: str) -> Role:
    return Role("agent.agent", "AgentSettings", log, *arguments)


def front_door(log: Path, *arguments: str, inherit: socket.socket | None = None) -> Role:
    return Role("gateway.app", "FrontDoorSettings", log, *arguments, inherit=inherit)


def listener() -> socket.socket:
    """A listening socket on a free port, such as a supervisor holds."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    sock.set_inheritable(True)
    return sock


def below(pid: int) -> list[int]:
    """Process ids of all descendants."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *below(int(child))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


__all__ = ["Role", "agent", "alive", "below", "eventually", "front_door", "listener", "os"]

"""A Compose project of this repository, as a test drives it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def redis_image() -> str:
    """The one that compose.yaml names; Redis's where an engine that can't fetch images has that one only."""
    given = os.environ.get("REDIS_IMAGE", "valkey/valkey:9")
    found = [
        subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode
        for name in (given, "redis:8")
    ]
    return "redis:8" if found == [1, 0] else given


class Project:
    """`docker compose` with a project name of its own and `environment` for what compose.yaml reads."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = f"lachesis-{name}-{os.getpid()}"
        self._environment = {**os.environ, "REDIS_IMAGE": redis_image(), **environment}

    def compose(self, *arguments: str, check: bool = True) -> str:
        command = ["docker", "compose", "-p", self.name, *arguments]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False, env=self._environment)
        assert done.returncode == 0 or not check, f"{command} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def lachesis(self, *arguments: str) -> Any:
        """What a command that only looks prints as JSON."""
        last = self.compose("run", "--rm", "--no-deps", "-T", "observer", *arguments, check=False)
        if last.startswith(("{", "[")):
            return json.loads(last)
        raise AssertionError(f"lachesis {' '.join(arguments)} printed {last!r}")

    def redis(self, *command: str) -> str:
        """What its administrator is told."""
        return self.compose("exec", "-T", "redis", "/users/cli", *command)

    def inspect(self, service: str) -> Any:
        """What the engine knows of the service's first container."""
        container = self.compose("ps", "--all", "--quiet", service).split()[0]
        return json.loads(self.docker("inspect", container))[0]

    def docker(self, *arguments: str) -> str:
        return subprocess.run(["docker", *arguments], text=True, stdout=subprocess.PIPE, check=True).stdout

    def wait(self, what: str, condition: Callable[[], Any], timeout_s: float) -> Any:
        """Its first true result."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except AssertionError:  # nothing answers while what it asks starts again
                pass
            time.sleep(1)
        raise AssertionError(f"{what}: not in {timeout_s} s\n{self.compose('logs', '--tail', '15', check=False)}")

    def wait_for_step(self, step: int, timeout_s: float, policy: str = "main") -> dict[str, Any]:
        """The run's status once that step is committed."""

        def reached() -> dict[str, Any] | None:
            now: dict[str, Any] = self.lachesis("status", "--policy", policy, "--json")
            return now if now["newest_step"] and now["newest_step"]["step"] >= step else None

        found: dict[str, Any] = self.wait(f"step {step}", reached, timeout_s)
        return found

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5", check=False)

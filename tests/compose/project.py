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


class Project:
    """`docker compose` with a project name of its own and `environment` for what compose.yaml reads."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = f"lachesis-{name}-{os.getpid()}"
        self._environment = {**os.environ, **environment}

    def compose(self, *arguments: str, check: bool = True) -> str:
        command = ["docker", "compose", "-p", self.name, *arguments]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False, env=self._environment)
        assert done.returncode == 0 or not check, f"{command} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def lachesis(self, *arguments: str) -> Any:
        """What a command prints as JSON, in a shim that answers."""
        last = ""
        for index in (1, 2):
            last = self.compose("exec", "-T", "--index", str(index), "shim", "lachesis", *arguments, check=False)
            if last.startswith(("{", "[")):
                return json.loads(last)
        raise AssertionError(f"lachesis {' '.join(arguments)} printed {last!r}")

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

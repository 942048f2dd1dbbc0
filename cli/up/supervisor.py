"""Child processes that are kept running: started in order, restarted with backoff, stopped in order.

A part is a command with a log file. Exit 0 means it is done; exit 2 that its settings are wrong, which no restart
mends; anything else, a signal included, that it is started again. One that fails again and again without having been of
use in between, however long each attempt takes, ends the wait for all. Every child is told to end when this process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lachesis.broker.errors import LachesisError
from lachesis.broker.store.child_process import die_with_parent

PART_BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0)
PART_STEADY_S = 60.0  # a part that was of use, and ran this long, starts its backoff anew
GIVE_UP = 6  # failures in a row
WRONG_SETTINGS = 2


class PartFailed(LachesisError, RuntimeError):
    """A part can't run; the message carries the last lines of its log."""


@dataclass
class Part:
    """One supervised process."""

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    inherit: Sequence[int] = ()  # file descriptors handed to the process
    state: str = "waiting"  # waiting | running | restarting | done | stopped | failed
    restarts: int = 0
    pid: int | None = None
    useful: bool = False  # whether its present life has done what it is for

    def tail(self, lines: int = 8) -> list[str]:
        """The last lines of the log."""
        try:
            with open(self.log, "rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 8192))
                return log.read().decode(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []


class Supervisor:
    """Runs parts; `note(text)` is told about everything a person would want to know."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.parts: dict[str, Part] = {}
        self._note = note
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stopping: set[str] = set()

    def start(self, part: Part) -> None:
        """Start a part and keep it running until it is done or stopped."""
        self.parts[part.name] = part
        self._tasks[part.name] = asyncio.create_task(self._keep_running(part), name=part.name)

    async def wait(self, name: str) -> None:
        """Wait until the part is done (exit 0) or stopped. Raises PartFailed if it, or any other part, can't run."""
        waiter = self._tasks[name]
        while not waiter.done():
            running = [task for task in self._tasks.values() if not task.done()]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=1.0)
            self.check()
        self.check()

    def check(self) -> None:
        """Raise the PartFailed of a part that can't run."""
        for task in self._tasks.values():
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    def of_use(self, *names: str) -> None:
        """These parts have done what they are for; a failure after that is the first one again."""
        for name in names:
            if name in self.parts:
                self.parts[name].useful = True

    async def stop(self, *names: str, grace_s: float = 30.0) -> None:
        """End these parts gracefully, at the same time: SIGTERM, and SIGKILL for what is left after `grace_s`."""
        known = [name for name in names if name in self._tasks]
        for name in known:
            self._stopping.add(name)
            if (process := self._processes.get(name)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        if not known:
            return
        _, late = await asyncio.wait([self._tasks[name] for name in known], timeout=grace_s)
        for task in late:
            self._note(f"{task.get_name()} did not stop within {grace_s:.0f} s: killed")
            self._kill(task.get_name())
        if late:
            await asyncio.wait(late)

    def kill_all(self) -> None:
        """SIGKILL every process group, now."""
        for name in self.parts:
            self._stopping.add(name)
            self._kill(name)

    def _kill(self, name: str) -> None:
        if (process := self._processes.get(name)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    async def _keep_running(self, part: Part) -> None:
        failures = 0
        while part.name not in self._stopping:
            began, part.useful = time.monotonic(), False
            code = await self._run_once(part)
            if part.name in self._stopping:
                part.state = "stopped"
                return
            if code == 0:
                part.state = "done"
                return
            if part.useful and time.monotonic() - began > PART_STEADY_S:
                failures = 0
            failures += 1
            if code == WRONG_SETTINGS or failures >= GIVE_UP:
                part.state = "failed"
                raise PartFailed(self._obituary(part, code, failures))
            delay = PART_BACKOFF_S[min(failures, len(PART_BACKOFF_S)) - 1]
            part.state, part.restarts = "restarting", part.restarts + 1
            self._note(f"{part.name} ended ({_cause(code)}), starting again in {delay:g} s")
            await asyncio.sleep(delay)
        part.state = "stopped"

    async def _run_once(self, part: Part) -> int:
        part.log.parent.mkdir(parents=True, exist_ok=True)
        with open(part.log, "ab") as log:
            process = await asyncio.create_subprocess_exec(
                *part.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **part.env},
                pass_fds=tuple(part.inherit),
                start_new_session=True,  # Ctrl-C in the terminal reaches only the supervisor, which stops them in order
                preexec_fn=die_with_parent,
            )
        self._processes[part.name] = process
        part.pid, part.state = process.pid, "running"
        try:
            return await process.wait()
        finally:
            part.pid = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a killed part left behind
            del self._processes[part.name]

    @staticmethod
    def _obituary(part: Part, code: int, failures: int) -> str:
        lines = part.tail()
        if code == WRONG_SETTINGS and lines:
            return lines[-1]
        times = f", {failures} times in a row" if failures > 1 else ""
        return "\n  ".join((f"{part.name} ended ({_cause(code)}{times}); its log is {part.log}", *lines))


def _cause(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"

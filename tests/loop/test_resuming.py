"""A run that was finished, drained or killed goes on by the same command, and nothing stays behind it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from demo import FIRST_STEPS, PATIENCE_S, Demo, audited, descendants, outcome

pytestmark = [pytest.mark.loop, pytest.mark.alone, pytest.mark.sglang, pytest.mark.verl, pytest.mark.timeout(1200)]
STEPS = 8


def test_a_finished_run_trains_on_when_it_is_given_more_steps(first_run: Demo) -> None:
    found = outcome(first_run.folder)
    assert [entry.step for entry in found.ledger] == list(range(1, FIRST_STEPS + 1))
    assert len(found.held_out) >= 2  # before and after, and on the way
    again = Demo(first_run.folder, "--steps", str(2 * FIRST_STEPS))
    try:
        assert "audit clean" in again.end()
    finally:
        again.kill()
    assert [entry.step for entry in outcome(first_run.folder).ledger] == list(range(1, 2 * FIRST_STEPS + 1))


def test_a_killed_run_leaves_nothing_running_and_resumes(up: Callable[..., Demo]) -> None:
    demo = up("--steps", str(STEPS))
    demo.wait_for_step(3)
    below = descendants(demo.process.pid)
    assert below
    demo.process.kill()
    demo.process.wait()
    deadline = time.monotonic() + PATIENCE_S  # the trainer finishes its step and waits for the Redis that is gone
    while alive := [pid for pid in below if _runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.2)
    up("--steps", str(STEPS)).end()
    report = audited(demo.folder)
    assert report["clean"], report
    assert report["steps"] == STEPS


def test_ctrl_c_drains_and_the_same_command_goes_on(up: Callable[..., Demo]) -> None:
    demo = up("--steps", str(STEPS))
    demo.wait_for_step(2)
    demo.process.send_signal(signal.SIGINT)
    assert "interrupted: step" in demo.end(130)
    assert not descendants(demo.process.pid)
    before = outcome(demo.folder).ledger[-1].step
    assert 2 <= before < STEPS

    up("--steps", str(STEPS)).end()
    report = audited(demo.folder)
    assert report["clean"], report
    assert f"has its {STEPS} steps already" in up("--steps", str(STEPS)).end()


def _runs(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty where it is a zombie
    except (FileNotFoundError, ProcessLookupError):
        return False

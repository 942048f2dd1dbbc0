"""A run that was finished or killed goes on by the same command, and nothing stays behind it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from demo import FIRST_STEPS, PATIENCE_S, Demo, audited, descendants, outcome

pytestmark = [pytest.mark.loop, pytest.mark.alone, pytest.mark.sglang, pytest.mark.verl, pytest.mark.timeout(1200)]
STEPS = 11


def test_a_finished_run_is_given_more_steps_is_killed_and_goes_on(first_run: Demo) -> None:
    found = outcome(first_run.folder)
    assert [entry.step for entry in found.ledger] == list(range(1, FIRST_STEPS + 1))
    assert len(found.held_out) >= 2  # before and after, and on the way
    more = ("--steps", str(STEPS))
    demo, again = Demo(first_run.folder, *more), None
    try:
        demo.wait_for_step(FIRST_STEPS + 3)
        below = descendants(demo.process.pid)
        assert below
        demo.process.kill()
        demo.process.wait()
        deadline = time.monotonic() + PATIENCE_S  # the trainer finishes its step and waits for the Redis that is gone
        while alive := [pid for pid in below if _runs(pid)]:
            assert time.monotonic() < deadline, f"still running: {alive}"
            time.sleep(0.2)
        again = Demo(first_run.folder, *more)
        assert "audit clean" in again.end()
    finally:
        for one in (demo, again):
            if one:
                one.kill()
    assert [entry.step for entry in outcome(first_run.folder).ledger] == list(range(1, STEPS + 1))
    report = audited(first_run.folder)
    assert report["clean"], report


def _runs(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty where it is a zombie
    except (FileNotFoundError, ProcessLookupError):
        return False

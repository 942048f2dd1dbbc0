"""The demo, with every kind of process killed by SIGKILL in the middle: it recovers by itself, and the audit is clean."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from demo import Demo, audited

pytestmark = [pytest.mark.loop, pytest.mark.alone, pytest.mark.sglang, pytest.mark.verl, pytest.mark.timeout(1800)]

VICTIMS = ("trainer", "shim", "sglang", "redis", "env", "front-door", "inference")
STEPS, STEPS_LONG = 29, 150


def test_any_process_may_be_killed(up: Callable[..., Demo], long_form: bool) -> None:
    steps = STEPS_LONG if long_form else STEPS
    demo = up("--steps", str(steps))
    for index, victim in enumerate(VICTIMS):
        demo.wait_for_step(3 + index * (steps - 8) // len(VICTIMS))
        os.kill(demo.pid_of(victim), signal.SIGKILL)
    demo.end()
    report = audited(demo.folder)
    assert report["clean"], report
    assert report["steps"] == steps
    assert report["newest_version"] == steps

"""What `make demo` promises: a real environment, SGLang and verl on this machine, and reward rises."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest
from demo import Demo, audited, descendants, outcome

pytestmark = [pytest.mark.loop, pytest.mark.alone, pytest.mark.sglang, pytest.mark.verl, pytest.mark.timeout(1200)]

CONTROL = 15  # steps


def test_the_demo_learns(up: Callable[..., Demo]) -> None:
    demo = up()
    assert "audit clean" in demo.end()
    found = outcome(demo.folder)
    before, *_, after = found.held_out
    steps = len(found.ledger)
    last = sum(entry.reward for entry in found.ledger[-10:]) / 10
    lag = max(entry.lag for entry in found.ledger)
    print(json.dumps({"before": before, "after": after, "last_10": last, "steps": steps, "lag": lag}))
    assert before <= 0.5
    assert after >= 0.95
    assert last >= 0.9
    assert lag <= 1
    assert found.versions == list(range(steps + 1))


def test_with_a_learning_rate_of_0_it_stays_where_it_was(up: Callable[..., Demo]) -> None:
    """Interrupted in the middle, which drains it, and taken up again by the same command."""
    control = ("--steps", str(CONTROL), "actor_rollout_ref.actor.optim.lr=0")
    demo = up(*control)
    demo.wait_for_step(CONTROL // 2)
    demo.process.send_signal(signal.SIGINT)
    assert "interrupted: step" in demo.end(130)
    assert not descendants(demo.process.pid)
    assert CONTROL // 2 <= len(outcome(demo.folder).ledger) < CONTROL

    up(*control).end()
    report = audited(demo.folder)
    assert report["clean"], report
    found = outcome(demo.folder)
    before, *_, after = found.held_out
    assert after == pytest.approx(before, abs=0.01)  # greedy answers of the same weights
    first, last = (sum(entry.reward for entry in part) / 7 for part in (found.ledger[:7], found.ledger[-7:]))
    assert last == pytest.approx(first, abs=0.12)  # 896 samples each: five standard errors; learning moves it by 0.3
    assert f"has its {CONTROL} steps already" in up(*control).end()

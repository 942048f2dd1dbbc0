"""What `make demo` promises: a real environment, SGLang and verl on this machine, and reward rises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records import LedgerEntry

pytestmark = [pytest.mark.loop, pytest.mark.sglang, pytest.mark.verl, pytest.mark.timeout(900)]


class Outcome(NamedTuple):
    said: str
    ledger: list[LedgerEntry]
    held_out: list[float]
    versions: list[int]  # published
    audit_clean: bool


def up(folder: Path, *options: str, overrides: Sequence[str] = ()) -> Outcome:
    """Run `lachesis up` to its end and read the streams it leaves behind."""
    command = [sys.executable, "-m", "lachesis.cli.main", "up", "--state-dir", str(folder)]
    command += ["--shim-port", "0", "--front-door-port", "0", *options, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    async def read() -> Outcome:
        broker = await Broker.connect(server.url)
        ledger = [entry async for entry in broker.queue.ledger("main")]
        entries = await broker.journal.metrics()
        held_out = [float(fields["accuracy"]) for _, fields in entries if fields["kind"] == "eval"]
        published = await broker.redis.xrange(broker.keys.weights("main"))
        await broker.aclose()
        versions = [int(fields[b"version"]) for _, fields in published]
        return Outcome(done.stdout, ledger, held_out, versions, "audit clean" in done.stdout)

    with EmbeddedRedis(folder / "redis") as server:
        return anyio.run(read)


def test_the_demo_learns(tmp_path: Path) -> None:
    outcome = up(tmp_path, "--seed", "1")
    before, *_, after = outcome.held_out
    steps = len(outcome.ledger)
    last = [entry.reward for entry in outcome.ledger[-10:]]
    lags = [entry.lag for entry in outcome.ledger]
    print(json.dumps({"before": before, "after": after, "last_10": sum(last) / 10, "steps": steps, "lag": max(lags)}))
    assert before <= 0.5
    assert after >= 0.95
    assert sum(last) / 10 >= 0.9
    assert max(lags) <= 1
    assert outcome.versions == list(range(steps + 1))
    assert outcome.audit_clean


def test_with_a_learning_rate_of_0_it_stays_where_it_was(tmp_path: Path) -> None:
    outcome = up(tmp_path, "--seed", "1", "--steps", "15", overrides=["actor_rollout_ref.actor.optim.lr=0"])
    before, *_, after = outcome.held_out
    assert after == pytest.approx(before, abs=0.01)  # greedy answers of the same weights
    first, last = (sum(entry.reward for entry in part) / 5 for part in (outcome.ledger[:5], outcome.ledger[-5:]))
    assert last == pytest.approx(first, abs=0.1)  # 640 samples each: a standard error of about 0.02


def test_a_finished_run_trains_on_when_it_is_given_more_steps(tmp_path: Path) -> None:
    assert len(up(tmp_path, "--steps", "3").ledger) == 3
    outcome = up(tmp_path, "--steps", "6")
    assert [entry.step for entry in outcome.ledger] == [1, 2, 3, 4, 5, 6]
    assert outcome.audit_clean

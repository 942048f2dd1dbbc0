"""Trainers with lachesis.elastic, as processes with real verl: how many there are, and who dies, does not show."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from trainer_kit import PATIENCE_S, scored_group, start_trainer, until

from lachesis.broker import Broker, EmbeddedRedis, connect_blocking
from lachesis.broker.audit import audit
from lachesis.broker.records import LedgerEntry, Member

pytestmark = pytest.mark.verl

STEPS, GROUPS = 20, 6  # groups of a step, of four sequences each
SETTINGS = {
    "actor_rollout_ref.actor.optim.lr": 1e-2,
    "lachesis.batch_size": 4 * GROUPS,
    "lachesis.num_steps": STEPS,
    "lachesis.checkpoint_every": 3,
    "lachesis.keep_versions": 100,
    "lachesis.lease_s": 3,
    "lachesis.examples_every": 5,
}


async def fill(broker: Broker, groups: int) -> None:
    """Queue groups; the n-th is always the same. Every tenth holds a sequence that can't be trained."""
    for number in range(groups):
        group = scored_group(random.Random(number))
        if number % 10 == 0:
            group.tokens[1][-1] = 999  # beyond the vocabulary
        assert await broker.queue.put(f"{number:08d}", group, v_min=0, v_max=0) == "stored"


class Run:
    """One run on the shared Redis, with a state folder that its trainers share."""

    def __init__(self, url: str, name: str, folder: Path, model: Path) -> None:
        self.url, self.name, self.folder = url, name, folder
        self._model = model
        self._ends: list[Callable[[], object]] = []

    def words(self, name: str, *overrides: str) -> list[str]:
        settings = {"actor_rollout_ref.model.path": self._model, **SETTINGS, "lachesis.replica": name}
        return [*(f"{key}={value}" for key, value in settings.items()), "lachesis.elastic=true", *overrides]

    def start(self, name: str, *overrides: str, crash_at: str = "") -> Any:
        log = self.folder / f"{name}.log"
        process = start_trainer(
            self.url, self.name, self.folder, self.words(name, *overrides), crash_at=crash_at, log=log
        )
        self._ends.append(process.kill)
        return process

    def command(self, name: str, *overrides: str) -> subprocess.Popen[bytes]:
        """As a user starts it."""
        where = ("--redis-url", self.url, "--run", self.name, "--state-dir", str(self.folder))
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lachesis.cli.main", "trainer", *where, *self.words(name, *overrides)],
                stdout=log,
                stderr=log,
            )
        self._ends.append(process.kill)
        return process

    def end(self) -> None:
        for kill in self._ends:
            kill()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def weights(self, version: int) -> dict[str, Tensor]:
        return load_file(self.folder / f"weights/{self.name}/main/v{version:06d}/model.safetensors")

    def members(self, broker: Any) -> list[Member]:
        found: list[Member] = broker.call(broker.broker.members.members, "main")
        return found

    def wait_for(self, broker: Any, count: int) -> None:
        """Until so many replicas have the same weights."""
        until(lambda: [member.step >= 0 for member in self.members(broker)] == [True] * count)


@pytest.fixture
def make_run(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def make(name: str = "") -> Run:
        folder = tmp_path / (name or "run")
        folder.mkdir()
        runs.append(Run(shared_redis.url, f"{run_name}{name}", folder, tiny_model))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


async def ledger_of(broker: Broker) -> list[LedgerEntry]:
    return [entry async for entry in broker.queue.ledger("main")]


def check_clean(run: Run, broker: Any) -> list[LedgerEntry]:
    ledger: list[LedgerEntry] = broker.call(ledger_of, broker.broker)
    assert [(entry.step, entry.v_before) for entry in ledger] == [(n, n - 1) for n in range(1, STEPS + 1)]
    assert broker.call(audit, broker.broker).findings == []
    versions = broker.call(broker.broker.redis.xrange, broker.broker.keys.weights("main"))
    assert [int(fields[b"version"]) for _, fields in versions] == list(range(STEPS + 1))
    assert broker.call(broker.broker.queue.status).untrainable == STEPS * GROUPS // 10
    return ledger


def train(make_run: Callable[..., Run], name: str, count: int, *overrides: str) -> tuple[Run, list[dict[str, str]]]:
    """All steps with `count` replicas (0: one trainer that is none); the steps' metrics."""
    run = make_run(name)
    with connect_blocking(run.url, run.name) as broker:
        names = [f"r{number}" for number in range(count)] or ["single"]
        more = overrides if count else (*overrides, "lachesis.elastic=false")
        processes = [run.start(one, *more) for one in names]
        if count:
            run.wait_for(broker, count)
        broker.call(fill, broker.broker, STEPS * GROUPS)
        for one, process in zip(names, processes, strict=True):
            process.join(PATIENCE_S)
            assert process.exitcode == 0, run.log(one)
        ledger = check_clean(run, broker)
        if count > 1:
            assert {entry.replica for entry in ledger} == {" ".join(names)}
        found = [fields for _, fields in broker.call(broker.broker.journal.metrics)]
    steps = [fields for fields in found if fields["kind"] == "step"]
    assert [int(fields["step"]) for fields in steps] == list(range(1, STEPS + 1))
    return run, steps


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_any_number_of_replicas_train_the_same_weights_bit_for_bit(make_run: Callable[..., Run]) -> None:
    exact = "lachesis.elastic_dtype=fp64"
    (one, steps), (two, _), (three, theirs) = (train(make_run, f"x{count}", count, exact) for count in (1, 2, 3))
    for version in range(STEPS + 1):
        assert distance(one.weights(version), two.weights(version)) == 0.0
        assert distance(one.weights(version), three.weights(version)) == 0.0
    same = ("reward", "loss", "grad_norm", "entropy", "lag", "lag_mean", "tokens", "trained_tokens", "unfit_sequences")
    for mine, other in zip(steps, theirs, strict=True):
        assert [mine[name] for name in same] == [other[name] for name in same]


def test_replicas_train_what_a_single_trainer_trains(make_run: Callable[..., Run]) -> None:
    (single, steps), (three, theirs) = train(make_run, "s", 0), train(make_run, "t", 3)
    assert distance(single.weights(STEPS), three.weights(STEPS)) < 1e-3
    assert steps[0].keys() <= theirs[0].keys()
    for mine, other in zip(steps, theirs, strict=True):
        for name in ("reward", "lag", "lag_mean", "tokens", "critic/score/mean", "unfit_sequences"):
            assert mine[name] == other[name], name
        for name in ("loss", "grad_norm", "critic/advantages/mean", "critic/advantages/max", "response_length/max"):
            assert float(mine[name]) == pytest.approx(float(other[name]), rel=1e-2, abs=1e-4), name


def test_commands_killed_and_added_in_the_middle(make_run: Callable[..., Run]) -> None:
    """The first of three is killed with -9 and another one comes: the audit is clean, the weights are as without."""
    exact = "lachesis.elastic_dtype=fp64"
    expected, _ = train(make_run, "calm", 1, exact)
    run = make_run("killed")
    with connect_blocking(run.url, run.name) as broker:
        processes = {"first": run.command("first", exact)}
        run.wait_for(broker, 1)
        processes |= {name: run.command(name, exact) for name in ("second", "third")}
        run.wait_for(broker, 3)
        broker.call(fill, broker.broker, STEPS * GROUPS)

        def step() -> int:
            newest = broker.call(broker.broker.queue.newest_committed, "main")
            return newest.step if newest else 0

        until(lambda: step() >= 4)
        os.kill(processes["first"].pid, signal.SIGKILL)
        assert step() < STEPS
        processes["late"] = run.command("late", exact)
        for name, process in processes.items():
            process.wait(PATIENCE_S)
            assert process.returncode == (-signal.SIGKILL if name == "first" else 0), run.log(name)
        ledger = check_clean(run, broker)
        assert "first" in ledger[0].replica
        assert "first" not in ledger[-1].replica
    for version in range(STEPS + 1):
        assert distance(expected.weights(version), run.weights(version)) == 0.0
    told = subprocess.run(
        [sys.executable, "-m", "lachesis.cli.main", "audit", "--redis-url", run.url, "--run", run.name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("point", ["publish:4", "announce:4", "checkpoint:3", "voted:5", "committed:4", "healed:0"])
def test_a_replica_killed_at_its_worst_moment_is_not_missed(make_run: Callable[..., Run], point: str) -> None:
    run = make_run()
    with connect_blocking(run.url, run.name) as broker:
        leads = not point.startswith("healed")
        processes = {"leader": run.start("leader", crash_at=point if leads else "")}
        run.wait_for(broker, 1)
        broker.call(fill, broker.broker, STEPS * GROUPS)
        processes["other"] = run.start("other", crash_at="" if leads else point)
        processes["third"] = run.start("third")
        for name, process in processes.items():
            process.join(PATIENCE_S)
            dies = name == ("leader" if leads else "other")
            assert process.exitcode in ((-signal.SIGKILL, 0) if dies else (0,)), run.log(name)
        check_clean(run, broker)


def test_all_die_and_new_ones_replay(make_run: Callable[..., Run]) -> None:
    exact = "lachesis.elastic_dtype=fp64"
    expected, _ = train(make_run, "calm", 2, exact)
    run = make_run("died")
    with connect_blocking(run.url, run.name) as broker:
        processes = [run.start("a", exact, crash_at="committed:5"), run.start("b", exact, crash_at="reduced:6")]
        run.wait_for(broker, 2)
        broker.call(fill, broker.broker, STEPS * GROUPS)
        for process in processes:
            process.join(PATIENCE_S)
        names = ("c", "d")
        again = [run.start(name, exact) for name in names]
        for name, process in zip(names, again, strict=True):
            process.join(PATIENCE_S)
            assert process.exitcode == 0, run.log(name)
        check_clean(run, broker)
        assert "replayed" in run.log("c") + run.log("d")
    for version in range(STEPS + 1):
        assert distance(expected.weights(version), run.weights(version)) == 0.0


def test_several_ranks_of_one_replica_are_refused(make_run: Callable[..., Run]) -> None:
    run = make_run()
    told = subprocess.run(
        [sys.executable, "-m", "lachesis.cli.main", "trainer", "--ray-ranks", "2", *run.words("r")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 2
    assert "each replica is one process" in told.stderr

"""Runs of several trainers with lachesis.elastic, as processes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ports import free_port
from safetensors.torch import load_file
from torch import Tensor
from trainer_kit import PATIENCE_S, scored_group, start_trainer, until

from lachesis.broker import Broker, connect_blocking
from lachesis.broker.audit import audit
from lachesis.broker.records.steps import LedgerEntry, Member

STEPS, GROUPS = 12, 6  # groups of a step, of four sequences each
EXACT = "lachesis.elastic_dtype=fp64"
PATIENT = "lachesis.lease_s=60"  # where nobody dies: a busy machine stops none of them for so long
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

    def start(self, name: str, *overrides: str, crash_at: str = "", stop_at: str = "") -> Any:
        words, log = self.words(name, *overrides), self.folder / f"{name}.log"
        environment = {"LACHESIS_STOP_AT": stop_at}
        process = start_trainer(
            self.url, self.name, self.folder, words, crash_at=crash_at, log=log, environment=environment
        )
        self._ends.append(process.kill)
        return process

    def start_ranks(self, name: str, *overrides: str, ranks: int) -> list[Any]:
        """One replica of several ranks, as torchrun starts them."""
        port = free_port()
        started = []
        for rank in range(ranks):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_PORT": port,
            }
            environment = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
            words, log = self.words(name, *overrides), self.folder / f"{name}{rank or ''}.log"
            started.append(start_trainer(self.url, self.name, self.folder, words, log=log, environment=environment))
            self._ends.append(started[-1].kill)
        return started

    def command(self, name: str, *overrides: str) -> subprocess.Popen[bytes]:
        """As a user starts it."""
        return self._command(name, "--state-dir", str(self.folder), *self.words(name, *overrides))

    def command_like_run(self, name: str) -> subprocess.Popen[bytes]:
        """As a user starts one more."""
        return self._command(name, "--like-run", f"lachesis.replica={name}")

    def _command(self, name: str, *told: str) -> subprocess.Popen[bytes]:
        where = ("--redis-url", self.url, "--run", self.name)
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lachesis.cli.main", "trainer", *where, *told], stdout=log, stderr=log
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


Undisturbed = Callable[..., tuple[Run, list[dict[str, str]]]]  # of so many replicas, with overrides


async def ledger_of(broker: Broker) -> list[LedgerEntry]:
    return [entry async for entry in broker.queue.ledger("main")]


def check_clean(run: Run, broker: Any) -> list[LedgerEntry]:
    ledger: list[LedgerEntry] = broker.call(ledger_of, broker.broker)
    assert [(entry.step, entry.v_before) for entry in ledger] == [(n, n - 1) for n in range(1, STEPS + 1)]
    assert broker.call(audit, broker.broker).findings == []
    versions = broker.call(broker.broker.redis.xrange, broker.broker.keys.weights("main"))
    assert [int(fields[b"version"]) for _, fields in versions] == list(range(STEPS + 1))
    assert broker.call(broker.broker.queue.status).untrainable == len(range(0, STEPS * GROUPS, 10))
    return ledger


def train(run: Run, count: int, *overrides: str) -> list[dict[str, str]]:
    """All steps with `count` replicas (0: one trainer that is none); the steps' metrics."""
    with connect_blocking(run.url, run.name) as broker:
        names = [f"r{number}" for number in range(count)] or ["single"]
        more = (*overrides, PATIENT) if count else (*overrides, "lachesis.elastic=false")
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
    return steps


def train_in_ranks(run: Run, replicas: int) -> None:
    """All steps with replicas of two ranks each."""
    with connect_blocking(run.url, run.name) as broker:
        started = [run.start_ranks(f"r{number}", EXACT, PATIENT, ranks=2) for number in range(replicas)]
        run.wait_for(broker, replicas)
        broker.call(fill, broker.broker, STEPS * GROUPS)
        for process in (rank for ranks in started for rank in ranks):
            process.join(PATIENCE_S)
            assert process.exitcode == 0, run.log("r0") + run.log("r01")
        check_clean(run, broker)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)

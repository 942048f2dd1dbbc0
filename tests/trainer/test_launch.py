"""One trainer as several processes: started by torchrun, killed, restarted; and as actors on a Ray cluster of two nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_nodes import ray_cluster
from safetensors.numpy import load_file
from trainer_kit import PATIENCE_S, fill, start_trainer, until

from lachesis.broker import BlockingBroker, Broker, EmbeddedRedis, connect_blocking
from lachesis.broker.audit import audit
from lachesis.broker.records.steps import LedgerEntry

pytestmark = pytest.mark.verl

STEPS, BATCH, GROUP = 4, 8, 4
TRAINER = ("-m", "lachesis.cli.main", "trainer")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--rdzv-endpoint", "127.0.0.1:0",
            "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1", "-m", "--", "lachesis.cli.main", "trainer")  # fmt: skip


def settings(model: Path) -> list[str]:
    values = {
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.actor.optim.lr": 0.1,
        "actor_rollout_ref.actor.optim.optimizer": "SGD",  # Adam's first steps would show rounding where gradients are zero
        "lachesis.batch_size": BATCH,
        "lachesis.num_steps": STEPS,
        "lachesis.checkpoint_every": 2,
        "lachesis.lease_s": 3,
    }
    return [f"{key}={value}" for key, value in values.items()]


def words(url: str, run: str, state_dir: Path, model: Path, *more: str) -> list[str]:
    return ["--redis-url", url, "--run", run, "--state-dir", str(state_dir), *more, *settings(model)]


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, env={**os.environ, **environment}
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        assert process.wait(PATIENCE_S) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


async def ledger(broker: Broker) -> list[LedgerEntry]:
    return [entry async for entry in broker.queue.ledger("main")]


def wait_for_steps(blocking: BlockingBroker, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(blocking.call(ledger, blocking.broker)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check(url: str, run: str, state_dir: Path, expected: dict[str, Any]) -> None:
    with connect_blocking(url, run) as blocking:
        assert [entry.step for entry in blocking.call(ledger, blocking.broker)] == list(range(1, STEPS + 1))
        assert blocking.call(audit, blocking.broker).findings == []
    found = load_file(state_dir / f"weights/{run}/main/v{STEPS:06d}/model.safetensors")
    assert found.keys() == expected.keys()
    assert max(abs(found[name] - expected[name]).max() for name in found) < 1e-5


@pytest.fixture(scope="module")
def one_process(
    shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> dict[str, Any]:
    """The last version of a run in one process."""
    state_dir = tmp_path_factory.mktemp("one")
    with connect_blocking(shared_redis.url, "one") as blocking:
        blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP)
    process = start_trainer(shared_redis.url, "one", state_dir, settings(tiny_model))
    process.join(PATIENCE_S)
    assert process.exitcode == 0, (state_dir / "trainer.log").read_text()
    found: dict[str, Any] = load_file(state_dir / f"weights/one/main/v{STEPS:06d}/model.safetensors")
    return found


def test_torchrun_starts_ranks_and_starts_them_again(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path, one_process: dict[str, Any]
) -> None:
    url, log = shared_redis.url, tmp_path / "log"
    with connect_blocking(url, run_name) as blocking:
        blocking.call(fill, blocking.broker, groups=3 * BATCH // GROUP)
        process = start([*TORCHRUN, *words(url, run_name, tmp_path, tiny_model)], log)
        wait_for_steps(blocking, 3)
        ranks = {int(rank.environ()["RANK"]): rank for rank in psutil.Process(process.pid).children()}
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[1].pid, signal.SIGKILL)  # not the one that knows Redis
        blocking.call(fill, blocking.broker, groups=BATCH // GROUP, first=3 * BATCH // GROUP)
        finish(process, log)
    check(url, run_name, tmp_path, one_process)


def test_ray_places_ranks_on_two_nodes(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path, one_process: dict[str, Any]
) -> None:
    url, log = shared_redis.url, tmp_path / "log"
    with connect_blocking(url, run_name) as blocking:
        blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP)
    with ray_cluster(nodes=2) as address:
        ray = ("--ray-ranks", "2", "--ray-ranks-per-node", "1")
        finish(start([*TRAINER, *words(url, run_name, tmp_path, tiny_model, *ray)], log, RAY_ADDRESS=address), log)
    check(url, run_name, tmp_path, one_process)


@pytest.mark.long  # the test above, and test_together's of replicas of two ranks, each prove a half of it
def test_a_ray_group_and_a_torchrun_train_as_two_replicas(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path, one_process: dict[str, Any]
) -> None:
    url, elastic = shared_redis.url, ("lachesis.elastic=true", "lachesis.elastic_dtype=fp64")
    logs = [tmp_path / name for name in ("ray.log", "torchrun.log")]
    with connect_blocking(url, run_name) as blocking, ray_cluster(nodes=2) as address:
        told = words(url, run_name, tmp_path, tiny_model)
        ray = ["--ray-ranks", "2", "--ray-ranks-per-node", "1", *told, *elastic, "lachesis.replica=on-ray"]
        processes = [
            start([*TRAINER, *ray], logs[0], RAY_ADDRESS=address),
            start([*TORCHRUN, *told, *elastic, "lachesis.replica=here"], logs[1]),
        ]
        try:
            until(lambda: len(blocking.call(blocking.broker.members.members, "main")) == 2)
            blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP)
        finally:
            for process, log in zip(processes, logs, strict=True):
                finish(process, log)
        assert {entry.replica for entry in blocking.call(ledger, blocking.broker)} == {"here on-ray"}
    check(url, run_name, tmp_path, one_process)

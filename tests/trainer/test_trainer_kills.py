"""Trainers killed with SIGKILL at the worst moments: every step counts once, and the weights don't show it."""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from trainer_kit import PATIENCE_S, fill, scored_group
from verl_run import BATCH, GROUP, STEPS, Run, ledger, same, versions

from lachesis.broker import BlockingBroker, Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.records.steps import LedgerEntry

pytestmark = pytest.mark.verl


async def _wait_for_step(broker: Broker, step: int) -> None:
    """Wait until `step` was reported, which is the last thing a step does."""
    cursor, seen = "0-0", 0
    with anyio.fail_after(PATIENCE_S):
        while seen < step:
            for entry_id, fields in await broker.journal.metrics(cursor, block_s=1.0):
                cursor, seen = entry_id, int(fields["step"])


def wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{text!r} never appeared in {path}"
        time.sleep(0.05)


@pytest.fixture
def a_run(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path) -> Run:
    return Run(shared_redis.url, run_name, tmp_path, tiny_model)


@pytest.fixture(scope="module")
def undisturbed(
    shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[tuple[Run, list[LedgerEntry]]]:
    run = Run(shared_redis.url, "undisturbed", tmp_path_factory.mktemp("undisturbed"), tiny_model)
    with run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP + 1)
        assert run.finish(run.start()) == 0
        yield run, blocking.call(ledger, blocking.broker)


def check_same(run: Run, blocking: BlockingBroker, undisturbed: tuple[Run, list[LedgerEntry]]) -> None:
    reference, expected = undisturbed
    trained = blocking.call(ledger, blocking.broker)
    assert [entry.step for entry in trained] == list(range(1, STEPS + 1))
    assert [entry.gids for entry in trained] == [entry.gids for entry in expected]
    assert [entry.loss for entry in trained] == [entry.loss for entry in expected]
    assert blocking.call(versions, blocking.broker) == list(range(STEPS + 1))
    for version in range(STEPS + 1):
        assert same(run.weights(version), reference.weights(version)), f"version {version} differs"


def test_an_undisturbed_run_trains_exactly_its_steps(undisturbed: tuple[Run, list[LedgerEntry]]) -> None:
    run, trained = undisturbed
    assert [(entry.step, entry.n, entry.lag) for entry in trained] == [(s, BATCH, s - 1) for s in range(1, STEPS + 1)]
    with run.broker() as blocking:
        assert blocking.call(versions, blocking.broker) == list(range(STEPS + 1))
        metrics = [fields for _, fields in blocking.call(blocking.broker.journal.metrics)]
        status = blocking.call(blocking.broker.queue.status)
    assert [int(fields["step"]) for fields in metrics] == list(range(1, STEPS + 1))
    assert {"reward", "entropy", "clip_frac", "kl", "logp_gap_mean", "tokens_per_s", "wait_share"} <= metrics[0].keys()
    assert (status.groups, status.delivered) == (1, STEPS)  # nothing was leased beyond the last step
    assert not run.weights(0)["lm_head.weight"].equal(run.weights(STEPS)["lm_head.weight"])


KILLS = [
    ("prefetched:2", "after a batch was made ready, while the one before it trains"),
    ("trained:2", "after the optimizer step, before the commit"),
    ("committed:3", "after the commit, before publishing"),
    ("checkpoint:4", "while a checkpoint is written"),
    ("checkpoint-noted:4", "when a checkpoint is written and known to Redis, and has not its name yet"),
    ("publish:5", "while a version's files are written"),
    ("announce:6", "after a version's files, before its event"),
]


def test_killed_again_and_again(a_run: Run, undisturbed: tuple[Run, list[LedgerEntry]]) -> None:
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP + 1)
        for point, when in KILLS:
            assert a_run.finish(a_run.start(crash_at=point)) == -signal.SIGKILL, when
        assert a_run.finish(a_run.start()) == 0
        check_same(a_run, blocking, undisturbed)
    left = [path.name for path in (a_run.state_dir / f"weights/{a_run.name}/main").glob(".[to]*")]
    left += [path.name for path in (a_run.state_dir / f"checkpoints/{a_run.name}/main").glob("*.tmp")]
    assert left == []  # nothing half-written stays


def test_a_batch_that_kills_the_trainer_leaves_a_hole_in_the_steps(a_run: Run) -> None:
    options = ("lachesis.max_deliveries=2", "lachesis.publish_every=4")
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=(STEPS + 1) * BATCH // GROUP)
        for point in ("trained:2", "trained:2", "trained:6", "trained:6"):
            assert a_run.finish(a_run.start(*options, crash_at=point)) == -signal.SIGKILL
        assert a_run.finish(a_run.start(*options)) == 0
        trained = blocking.call(ledger, blocking.broker)
        assert [entry.step for entry in trained] == [1, 3, 4, 5, 7]
        assert [(entry.v_before, entry.v_after) for entry in trained] == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 7)]
        assert blocking.call(versions, blocking.broker) == [0, 4, 7]  # the last step is published, whatever its number
        report = blocking.call(audit, blocking.broker)
        assert report.findings == []
        assert report.dead == 2 * BATCH // GROUP
        assert blocking.call(blocking.broker.queue.batches) == []


def test_sequences_that_can_not_be_trained_are_left_out_and_noted_once(a_run: Run) -> None:
    bad = scored_group(random.Random(7))
    bad.tokens[2][-1] = 9999
    bad.masks[1] = [-100] * len(bad.masks[1])
    unscored = scored_group(random.Random(8))
    unscored.scores = [math.nan] * len(unscored.scores)  # the shim refuses that; nothing else may
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=3 * BATCH // GROUP)
        blocking.call(blocking.broker.queue.put, "bad", bad, v_min=0, v_max=0)
        blocking.call(blocking.broker.queue.put, "unscored", unscored, v_min=0, v_max=0)
        settings = ("lachesis.num_steps=4", "lachesis.examples_every=1")
        assert a_run.finish(a_run.start(*settings, crash_at="committed:4")) == -signal.SIGKILL
        assert a_run.finish(a_run.start(*settings)) == 0  # trains step 4 again, commits it no second time
        letters = {letter.sequence: letter.entry.detail for letter in blocking.call(blocking.broker.dead.all)}
        assert letters == {
            ("bad", 1): "masks = -100: must train at least one token after the first",
            ("bad", 2): "tokens = 9999: ids must be from 0 to 319, the model's vocabulary",
            **{("unscored", row): "scores = nan: must be finite" for row in range(GROUP)},
        }
        report = blocking.call(audit, blocking.broker)
        assert (report.findings, report.trained, report.dead) == ([], 8, 0)
    assert "sequences that can't be trained are left out" in (a_run.state_dir / "trainer.log").read_text()


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint(a_run: Run) -> None:
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=3 * BATCH // GROUP)
        process = a_run.start()
        blocking.call(_wait_for_step, blocking.broker, 3)
        process.terminate()
        assert a_run.finish(process) == 0
        checkpoints = {path.name for path in (a_run.state_dir / f"checkpoints/{a_run.name}/main").iterdir()}
        assert checkpoints == {"step-2", "step-3"}
        assert blocking.call(blocking.broker.redis.exists, blocking.broker.keys.writer("main")) == 0
        assert blocking.call(blocking.broker.queue.batches) == []  # all covered, all freed


def test_a_standby_takes_over_from_a_killed_trainer(a_run: Run) -> None:
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=2 * BATCH // GROUP)
        first = a_run.start("lachesis.replica=a", log="first.log")
        blocking.call(_wait_for_step, blocking.broker, 2)
        second = a_run.start("lachesis.replica=b", log="second.log")
        wait_for_text(a_run.state_dir / "second.log", "standby")
        blocking.call(fill, blocking.broker, groups=1, first=100)
        first.kill()
        blocking.call(fill, blocking.broker, groups=7, first=101)
        assert a_run.finish(second) == 0
        trained = blocking.call(ledger, blocking.broker)
    assert [entry.step for entry in trained] == list(range(1, STEPS + 1))
    assert [entry.replica for entry in trained] == ["a"] * 2 + ["b"] * 4


def test_a_trainer_that_lost_its_lock_commits_nothing(a_run: Run) -> None:
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=BATCH // GROUP)
        process = a_run.start("lachesis.lease_s=30")  # no heartbeat notices in time: COMMIT itself must refuse
        blocking.call(_wait_for_step, blocking.broker, 1)
        blocking.call(blocking.broker.redis.set, blocking.broker.keys.writer("main"), "another")
        blocking.call(fill, blocking.broker, groups=BATCH // GROUP, first=100)
        assert a_run.finish(process) == 1
        assert [entry.step for entry in blocking.call(ledger, blocking.broker)] == [1]
        assert blocking.call(versions, blocking.broker) == [0, 1]
    assert "another process writes this policy now" in (a_run.state_dir / "trainer.log").read_text()


def test_a_trainer_whose_run_is_reset_stops(a_run: Run) -> None:
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=BATCH // GROUP)
        process = a_run.start()
        blocking.call(_wait_for_step, blocking.broker, 1)
        blocking.call(blocking.broker.reset)
        assert a_run.finish(process) == 1
    assert "was reset while policy 'main' was trained" in (a_run.state_dir / "trainer.log").read_text()


def test_folders_of_another_history_are_refused(a_run: Run) -> None:
    log = a_run.state_dir / "trainer.log"
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=2 * BATCH // GROUP)
        assert a_run.finish(a_run.start("lachesis.num_steps=2")) == 0
        blocking.call(blocking.broker.reset)
        assert a_run.finish(a_run.start()) == 1
        assert "the run was reset" in log.read_text()
        blocking.call(blocking.broker.forget)
        assert a_run.finish(a_run.start()) == 1
        assert "holds checkpoints of steps 2, but the ledger" in log.read_text()


def test_a_checkpoint_that_redis_knows_nothing_of_is_dropped(a_run: Run) -> None:
    checkpoints = a_run.state_dir / f"checkpoints/{a_run.name}/main"
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=3 * BATCH // GROUP)
        assert a_run.finish(a_run.start("lachesis.num_steps=2")) == 0
        shutil.copytree(checkpoints / "step-2", checkpoints / "step-9")
        assert a_run.finish(a_run.start("lachesis.num_steps=3")) == 0
        assert [entry.step for entry in blocking.call(ledger, blocking.broker)] == [1, 2, 3]
    assert {path.name for path in checkpoints.iterdir()} == {"step-2", "step-3"}


def test_a_spoiled_checkpoint_gives_way_to_the_one_before_it(a_run: Run) -> None:
    checkpoints, log = a_run.state_dir / f"checkpoints/{a_run.name}/main", a_run.state_dir / "trainer.log"
    spoiled = checkpoints / "step-2" / "optim_world_size_1_rank_0.pt"
    options = ("lachesis.num_steps=2", "lachesis.checkpoint_every=1")
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=3 * BATCH // GROUP)
        blocking.call(blocking.broker.queue.retention.keep, 1 << 30)
        assert a_run.finish(a_run.start(*options)) == 0
        whole = spoiled.read_bytes()
        spoiled.write_bytes(whole[:-1] + b"!")
        assert a_run.finish(a_run.start("lachesis.num_steps=3")) == 0
        assert log.read_text().count(f"why=\"'{spoiled}' has SHA-256 ") == 1
        assert [entry.step for entry in blocking.call(ledger, blocking.broker)] == [1, 2, 3]
        assert blocking.call(audit, blocking.broker).clean

        blocking.call(blocking.broker.queue.retention.keep, 0)
        blocking.call(blocking.broker.queue.retire, "main", 3)
        (checkpoints / "step-3" / "optim_world_size_1_rank_0.pt").unlink()
        assert a_run.finish(a_run.start("lachesis.num_steps=4")) == 1
    assert "step-3/optim_world_size_1_rank_0.pt' is missing: the checkpoint was saved with it" in log.read_text()
    assert "The checkpoint of step 2 is whole, but what was trained after it is freed" in log.read_text()

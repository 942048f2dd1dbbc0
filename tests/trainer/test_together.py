"""Trainers with lachesis.elastic, as processes with real verl: how many there are, and who dies, does not show."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import lachesis
from together_kit import EXACT, GROUPS, STEPS, Run, check_clean, distance, fill, train, train_in_ranks
from trainer_kit import PATIENCE_S, until

from lachesis.broker import EmbeddedRedis, connect_blocking

pytestmark = pytest.mark.verl


@pytest.fixture
def make_run(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def make() -> Run:
        runs.append(Run(shared_redis.url, run_name, tmp_path, tiny_model))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


Undisturbed = Callable[..., tuple[Run, list[dict[str, str]]]]


@pytest.fixture(scope="module")
def undisturbed(
    shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Undisturbed]:
    """`undisturbed(2, EXACT)`: a run of two replicas that nothing happens to, and its steps' metrics; made once."""
    runs: list[Run] = []

    @functools.cache
    def made(replicas: int, *overrides: str, ranks: int = 1) -> tuple[Run, list[dict[str, str]]]:
        folder = tmp_path_factory.mktemp("undisturbed")
        run = Run(shared_redis.url, f"together-{folder.name}", folder, tiny_model)
        runs.append(run)
        if ranks == 1:
            return run, train(run, replicas, *overrides)
        train_in_ranks(run, replicas)
        return run, []

    yield made
    for run in runs:
        run.end()


def test_any_number_of_replicas_train_the_same_weights_bit_for_bit(undisturbed: Undisturbed) -> None:
    (one, steps), (two, _), (three, theirs) = (undisturbed(count, EXACT) for count in (1, 2, 3))
    for version in range(STEPS + 1):
        assert distance(one.weights(version), two.weights(version)) == 0.0
        assert distance(one.weights(version), three.weights(version)) == 0.0
    same = ("reward", "loss", "grad_norm", "entropy", "lag", "lag_mean", "tokens", "trained_tokens", "unfit_sequences")
    for mine, other in zip(steps, theirs, strict=True):
        assert [mine[name] for name in same] == [other[name] for name in same]


def test_replicas_train_what_a_single_trainer_trains(undisturbed: Undisturbed) -> None:
    (single, steps), (three, theirs) = undisturbed(0), undisturbed(3)
    assert distance(single.weights(STEPS), three.weights(STEPS)) < 1e-3
    assert steps[0].keys() <= theirs[0].keys()
    for mine, other in zip(steps, theirs, strict=True):
        for name in ("reward", "lag", "lag_mean", "tokens", "critic/score/mean", "unfit_sequences"):
            assert mine[name] == other[name], name
        for name in ("loss", "grad_norm", "critic/advantages/mean", "critic/advantages/max", "response_length/max"):
            assert float(mine[name]) == pytest.approx(float(other[name]), rel=1e-2, abs=1e-4), name


def test_commands_killed_and_added_in_the_middle(make_run: Callable[[], Run], undisturbed: Undisturbed) -> None:
    """The first of three is killed with -9 and another one comes: the audit is clean, the weights are as without."""
    expected, _ = undisturbed(1, EXACT)
    run = make_run()
    with connect_blocking(run.url, run.name) as broker:
        first = run.command("first", EXACT)
        run.wait_for(broker, 1)
        others = [run.start(name, EXACT) for name in ("second", "third")]
        run.wait_for(broker, 3)
        broker.call(fill, broker.broker, STEPS * GROUPS)

        def step() -> int:
            newest = broker.call(broker.broker.queue.newest_committed, "main")
            return newest.step if newest else 0

        until(lambda: step() >= 4)
        os.kill(first.pid, signal.SIGKILL)
        assert step() < STEPS
        late = run.command_like_run("late")  # it is told nothing else
        assert late.wait(PATIENCE_S) == 0, run.log("late")
        for process in others:
            process.join(PATIENCE_S)
            assert process.exitcode == 0, run.log("second") + run.log("third")
        assert first.wait(PATIENCE_S) == -signal.SIGKILL
        ledger = check_clean(run, broker)
        assert "first" in ledger[0].replica
        assert "first" not in ledger[-1].replica
    for version in range(STEPS + 1):
        assert distance(expected.weights(version), run.weights(version)) == 0.0
    told = lachesis("audit", "--redis-url", run.url, "--run", run.name)
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize(
    ("point", "others"),
    [
        *(("publish:4", ["other"]), ("announce:4", ["other"]), ("checkpoint:3", ["other"])),
        *(("voted:5", ["other", "third"]), ("committed:4", ["other", "third"]), ("healed:0", ["other", "third"])),
    ],
)
def test_a_replica_killed_at_its_worst_moment_is_not_missed(
    make_run: Callable[[], Run], point: str, others: list[str]
) -> None:
    run = make_run()
    with connect_blocking(run.url, run.name) as broker:
        leads = not point.startswith("healed")
        processes = {"leader": run.start("leader", crash_at=point if leads else "")}
        run.wait_for(broker, 1)
        broker.call(fill, broker.broker, STEPS * GROUPS)
        for name in others:
            processes[name] = run.start(name, crash_at=point if name == "other" and not leads else "")
        for name, process in processes.items():
            process.join(PATIENCE_S)
            dies = name == ("leader" if leads else "other")
            assert process.exitcode in ((-signal.SIGKILL, 0) if dies else (0,)), run.log(name)
        check_clean(run, broker)


def test_all_die_and_new_ones_replay(make_run: Callable[[], Run], undisturbed: Undisturbed) -> None:
    expected, _ = undisturbed(2, EXACT)
    run = make_run()
    with connect_blocking(run.url, run.name) as broker:
        processes = [run.start("a", EXACT, crash_at="committed:5"), run.start("b", EXACT, crash_at="reduced:6")]
        run.wait_for(broker, 2)
        broker.call(fill, broker.broker, STEPS * GROUPS)
        for process in processes:
            process.join(PATIENCE_S)
        names = ("c", "d")
        again = [run.start(name, EXACT) for name in names]
        for name, process in zip(names, again, strict=True):
            process.join(PATIENCE_S)
            assert process.exitcode == 0, run.log(name)
        check_clean(run, broker)
        assert "replayed" in run.log("c") + run.log("d")
    for version in range(STEPS + 1):
        assert distance(expected.weights(version), run.weights(version)) == 0.0


# -- replicas of two ranks ----------------------------------------------------------------------------------------


def test_replicas_of_two_ranks_sum_shard_by_shard(undisturbed: Undisturbed) -> None:
    single, _ = undisturbed(0)
    (one, _), (two, _) = (undisturbed(count, ranks=2) for count in (1, 2))
    for version in range(STEPS + 1):
        assert distance(one.weights(version), two.weights(version)) == 0.0
    assert distance(single.weights(STEPS), two.weights(STEPS)) < 1e-3


def test_a_rank_that_dies_takes_its_replica_with_it_and_no_other(
    make_run: Callable[[], Run], undisturbed: Undisturbed
) -> None:
    """The second replica loses a rank; another one of two ranks takes its place, and heals shard by shard."""
    expected, _ = undisturbed(1, ranks=2)
    run = make_run()
    with connect_blocking(run.url, run.name) as broker:
        first = run.start_ranks("first", EXACT, ranks=2)
        run.wait_for(broker, 1)
        second = run.start_ranks("second", EXACT, ranks=2)
        run.wait_for(broker, 2)
        broker.call(fill, broker.broker, STEPS * GROUPS)
        until(lambda: broker.call(broker.broker.queue.newest_committed, "main") is not None)
        second[1].kill()
        third = run.start_ranks("third", EXACT, ranks=2)
        for process in (*first, *third):
            process.join(PATIENCE_S)
            assert process.exitcode == 0, run.log("first") + run.log("first1")
        second[0].join(PATIENCE_S)
        assert second[0].exitcode == 1, run.log("second")
        check_clean(run, broker)
    for version in range(STEPS + 1):
        assert distance(expected.weights(version), run.weights(version)) == 0.0

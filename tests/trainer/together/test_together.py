"""Trainers with lachesis.elastic, as processes with real verl: how many there are, and who dies, does not show."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from commands import lachesis
from together_kit import EXACT, GROUPS, STEPS, Run, Undisturbed, check_clean, distance, fill
from trainer_kit import PATIENCE_S, until

from lachesis.broker import connect_blocking

pytestmark = pytest.mark.verl


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

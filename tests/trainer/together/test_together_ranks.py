"""Trainers with lachesis.elastic that are several processes each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from together_kit import EXACT, GROUPS, STEPS, Run, Undisturbed, check_clean, distance, fill
from trainer_kit import PATIENCE_S, until

from lachesis.broker import connect_blocking

pytestmark = pytest.mark.verl


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

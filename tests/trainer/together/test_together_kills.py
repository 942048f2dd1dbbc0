"""Trainers with lachesis.elastic, one of them killed with -9 at its worst moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from together_kit import GROUPS, PATIENT, STEPS, Run, check_clean, fill
from trainer_kit import PATIENCE_S, is_stopped, until

from lachesis.broker import connect_blocking

pytestmark = pytest.mark.verl


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


def test_data_deleted_when_its_step_is_committed_is_missed_in_the_metrics_only(make_run: Callable[[], Run]) -> None:
    run = make_run()
    with connect_blocking(run.url, run.name) as broker:
        broker.call(fill, broker.broker, STEPS * GROUPS)
        leader = run.start("leader", PATIENT, stop_at="committed:4")
        until(lambda: is_stopped(leader))
        batch = broker.call(broker.broker.queue.batch, 4)
        assert batch is not None
        assert broker.call(broker.broker.redis.delete, broker.broker.keys.blob(batch.gids[0])) == 1
        os.kill(leader.pid, signal.SIGCONT)
        leader.join(PATIENCE_S)
        assert leader.exitcode == 0, run.log("leader")
        check_clean(run, broker)
        told = [fields for _, fields in broker.call(broker.broker.journal.metrics) if fields["kind"] == "step"]
        assert [int(fields["step"]) for fields in told] == [step for step in range(1, STEPS + 1) if step != 4]
        assert f"group {batch.gids[0]} has no blob" in run.log("leader")

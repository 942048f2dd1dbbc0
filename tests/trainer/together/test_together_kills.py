"""Trainers with lachesis.elastic, one of them killed with -9 at its worst moment."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from together_kit import GROUPS, STEPS, Run, check_clean, fill
from trainer_kit import PATIENCE_S

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

"""Replicas of one policy as processes, killed and stopped at every point: the same weights as without, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from elastic_run import Run, check, with_leader

from lachesis.broker import EmbeddedRedis

pytestmark = pytest.mark.verl

POINTS = (
    *("leased", "claimed", "accumulated", "reducing", "reduced", "voted", "committed", "applied"),
    *("published", "saving", "saved"),
)
POINTS_AND_OTHERS = [  # at each point alone and with one or two others; with the other number of them in the long form
    pytest.param(point, others, marks=pytest.mark.long if others == 1 + number % 2 else ())
    for number, point in enumerate(POINTS)
    for others in (0, 1, 2)
]
LEADS = ("leased", "published", "saving", "saved")  # only the first replica gets there


@pytest.mark.parametrize(("point", "others"), POINTS_AND_OTHERS)
def test_a_replica_killed_at_any_point_is_not_missed(
    shared_redis: EmbeddedRedis,
    run_name: str,
    make_run: Callable[..., Run],
    undisturbed: list[tuple[int, str]],
    point: str,
    others: int,
) -> None:
    """The first one, which leads; where it was alone, another comes."""
    run = make_run(shared_redis.url, run_name, compute_s=0.01)
    with_leader(run, crash_at=f"{point}:3")
    names = [f"r{number}" for number in range(others)]
    for name in names:
        run.start(name)
    if point == "voted":  # whose vote is the last does not wait, and lives
        assert run.exit_of("leader") in (-signal.SIGKILL, 0), run.log("leader")
    else:
        assert run.exit_of("leader") == -signal.SIGKILL, run.log("leader")
    if not others:
        run.start("later")
    check(run, undisturbed, *(names or ["later"]))


@pytest.mark.parametrize("point", [point for point in POINTS if point not in LEADS])
def test_one_that_does_not_lead_is_not_missed_either(
    shared_redis: EmbeddedRedis,
    run_name: str,
    make_run: Callable[..., Run],
    undisturbed: list[tuple[int, str]],
    point: str,
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.03)
    with_leader(run)
    run.start("doomed", crash_at=f"{point}:5")
    check(run, undisturbed, "leader")
    assert run.exit_of("doomed") in (-signal.SIGKILL, 0)  # 0: another's vote was the last


@pytest.mark.parametrize("point", POINTS)
def test_all_die_and_others_go_on_from_checkpoint_and_ledger(
    shared_redis: EmbeddedRedis,
    run_name: str,
    make_run: Callable[..., Run],
    undisturbed: list[tuple[int, str]],
    point: str,
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.01)
    with_leader(run, crash_at=f"{point}:3")
    run.start("r1", crash_at=f"{'reducing' if point in LEADS else point}:3")
    run.start("r2", crash_at="claimed:4")
    for name in run.processes:
        assert run.exit_of(name) in (-signal.SIGKILL, 0), run.log(name)
    for name in ("new0", "new1"):
        run.start(name)
    check(run, undisturbed, "new0", "new1")

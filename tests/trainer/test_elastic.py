"""Replicas of one policy as processes, killed and stopped at every point: the same weights as without, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import elastic_process
import pytest
from elastic_process import Settings
from scored import group
from trainer_kit import PATIENCE_S, context, until

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking
from lachesis.broker.audit import audit
from lachesis.broker.records import LedgerEntry

pytestmark = pytest.mark.verl

STEPS, GROUPS = 6, 6  # groups of a step, of two sequences each
SILENT_S = 2.0  # a busy machine stops nobody for so long
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


class Run:
    """One run on a Redis, and its replicas."""

    def __init__(self, url: str, name: str, folder: Path, **settings: Any) -> None:
        self.url, self.name, self.folder, self._settings = url, name, folder, settings
        self.processes: dict[str, ForkServerProcess] = {}
        self.steps, self._queued = settings.get("steps", STEPS), 0
        folder.mkdir()

    def queue(self, steps: int) -> None:
        """Queue the groups of the steps up to this one; where there are none, the replicas wait."""
        with connect_blocking(self.url, self.name) as broker:
            for number in range(self._queued * GROUPS, steps * GROUPS):
                broker.call(broker.broker.queue.put, f"g{number:03d}", group(number % 64), v_min=0, v_max=0)
        self._queued = steps

    def start(self, name: str, *, crash_at: str = "", **settings: Any) -> ForkServerProcess:
        told = Settings(self.url, self.name, str(self.folder), name, **(self._settings | settings))
        process = context.Process(target=elastic_process.main, args=(told, crash_at))
        process.start()
        self.processes[name] = process
        return process

    def exit_of(self, name: str) -> int | None:
        """How it ended, waiting for that; None if it does not."""
        self.processes[name].join(PATIENCE_S)
        return self.processes[name].exitcode

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(url: str, name: str, *, queued: int | None = None, **settings: Any) -> Run:
        """A run whose groups are queued, all of them or those of so many steps."""
        runs.append(Run(url, name, tmp_path / name, **settings))
        runs[-1].queue(runs[-1].steps if queued is None else queued)
        return runs[-1]

    yield make
    for run in runs:
        run.end()


async def read_ledger(broker: BlockingBroker) -> list[LedgerEntry]:
    return [entry async for entry in broker.broker.queue.ledger("main")]


def ledger_of(broker: BlockingBroker) -> list[LedgerEntry]:
    return broker.call(read_ledger, broker)


def versions_of(broker: BlockingBroker) -> list[tuple[int, str]]:
    found = broker.call(broker.broker.redis.xrange, broker.broker.keys.weights("main"))
    return [(int(fields[b"version"]), fields[b"manifest_sha256"].decode()) for _, fields in found]


def check(run: Run, expected: list[tuple[int, str]], *finished: str) -> None:
    """Every step is there once, every version has the weights of an undisturbed run, and so have those that finished."""
    for name in finished:
        assert run.exit_of(name) == 0, run.log(name)
        told = json.loads((run.folder / f"{name}.json").read_text())
        assert told == {"step": expected[-1][0], "digest": expected[-1][1]}, name
    with connect_blocking(run.url, run.name) as broker:
        assert [entry.step for entry in ledger_of(broker)] == list(range(1, expected[-1][0] + 1))
        assert versions_of(broker) == expected
        assert broker.call(audit, broker.broker).findings == []
        assert broker.call(broker.broker.queue.status).untrainable == expected[-1][0]  # one of each step, once


@pytest.fixture(scope="module")
def undisturbed(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """(version, hash of the weights) of one replica that nothing happens to, and of three."""
    found = []
    for count in (1, 3):
        run = Run(shared_redis.url, f"undisturbed{count}", tmp_path_factory.mktemp("undisturbed") / str(count))
        run.queue(STEPS)
        with connect_blocking(run.url, run.name) as broker:
            for number in range(count):
                run.start(f"r{number}")
            for number in range(count):
                assert run.exit_of(f"r{number}") == 0, run.log(f"r{number}")
            found.append(versions_of(broker))
            assert [version for version, _ in found[-1]] == list(range(STEPS + 1))
    assert found[0] == found[1]
    return found[0]


def with_leader(run: Run, **settings: Any) -> None:
    """Start a replica that leads all others started after it."""
    run.start("leader", **settings)
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: broker.call(broker.broker.members.members, "main"))


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


# -- what else happens --------------------------------------------------------------------------------------------


def step_of(broker: BlockingBroker) -> int:
    newest = broker.call(broker.broker.queue.newest_committed, "main")
    return newest.step if newest else 0


def test_a_silent_replica_is_left_out_and_comes_back_as_another(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.1, silent_s=SILENT_S, queued=2)
    with_leader(run)
    zombie = run.start("zombie")
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: [m.step >= 0 for m in broker.call(broker.broker.members.members, "main")] == [True, True])
        assert zombie.pid is not None
        os.kill(zombie.pid, signal.SIGSTOP)
        run.queue(STEPS)
        stopped_at = step_of(broker)
        until(lambda: step_of(broker) >= stopped_at + 2)
        assert len(broker.call(broker.broker.members.members, "main")) == 1
        os.kill(zombie.pid, signal.SIGCONT)
    check(run, undisturbed, "leader", "zombie")


def test_one_that_wakes_when_its_groups_are_trained_and_freed_comes_back_too(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.1, silent_s=SILENT_S, queued=1)
    with_leader(run)
    zombie = run.start("zombie", stop_at="claimed:2")
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: [m.step >= 0 for m in broker.call(broker.broker.members.members, "main")] == [True, True])
    run.queue(STEPS)
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: len(ledger_of(broker)) > 3)  # the third step has a checkpoint, which frees the second's groups
        assert [member.id.split(":")[0] for member in broker.call(broker.broker.members.members, "main")] == ["leader"]
        assert zombie.pid is not None
        os.kill(zombie.pid, signal.SIGCONT)
    check(run, undisturbed, "leader", "zombie")


def test_a_trainer_that_trains_alone_takes_over_from_silent_replicas(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    """The replica that wakes then leaves, and founds anew from checkpoint and ledger when the other is gone."""
    run = make_run(shared_redis.url, run_name, compute_s=0.05, hold_s=2.0, queued=STEPS - 1)
    with_leader(run)
    leader = run.processes["leader"]
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: step_of(broker) >= 4)  # there is a checkpoint
        assert leader.pid is not None
        os.kill(leader.pid, signal.SIGSTOP)
        lock = broker.broker.parties.writer("main", ttl_s=60)
        until(lambda: broker.call(lock.acquire, blocking=False))
        before = step_of(broker)
        os.kill(leader.pid, signal.SIGCONT)
        until(lambda: not broker.call(broker.broker.members.members, "main"))
        assert step_of(broker) == before
        broker.call(lock.release)
        run.queue(STEPS)
        check(run, undisturbed, "leader")
        standing = broker.call(broker.broker.members.standing, "main")
        assert standing is not None
        assert standing.generation == 2


def test_replicas_that_come_in_the_middle_get_the_newest_weights(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.05, queued=STEPS - 1)
    with_leader(run)
    with connect_blocking(run.url, run.name) as broker:
        for number in range(2):
            until(lambda: step_of(broker) > number)  # noqa: B023  # it is called at once
            run.start(f"late{number}")
        until(lambda: [m.step >= 0 for m in broker.call(broker.broker.members.members, "main")] == [True] * 3)
        run.queue(STEPS)
        check(run, undisturbed, "leader", "late0", "late1")
        assert ledger_of(broker)[-1].replica == "late0 late1 leader"


@pytest.mark.parametrize("together_s", [0.0, 0.5], ids=["one_by_one", "at_once"])
def test_a_slow_replica_delays_a_step_by_one_group_at_most(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run], together_s: float
) -> None:
    steps = 2 * STEPS
    run = make_run(shared_redis.url, run_name, compute_s=0.02, together_s=together_s, steps=steps, queued=1)
    with_leader(run, compute_s=0.6)
    for name in ("fast0", "fast1"):
        run.start(name)
    trained: dict[int, int] = {}  # step → groups that the slow one trained until then
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: [m.step >= 0 for m in broker.call(broker.broker.members.members, "main")] == [True] * 3)
        run.queue(steps)
        while step_of(broker) < steps - 1:
            slow = broker.call(broker.broker.members.members, "main")[0]
            trained[slow.step] = slow.trained
            time.sleep(0.01)
    _, first, *_, last = sorted(trained.items())  # in the step that others joined in it may have had more
    assert last[0] - first[0] >= 2
    assert (0 if together_s else 1) <= last[1] - first[1] <= last[0] - first[0]
    for name in ("leader", "fast0", "fast1"):
        assert run.exit_of(name) == 0, run.log(name)


def test_replicas_outlive_redis(
    redis_server: EmbeddedRedis, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    """Away for longer than a replica may be silent, and shorter than they hold the lock: nobody goes back."""
    run = make_run(redis_server.url, "outlive", compute_s=0.05, silent_s=SILENT_S, hold_s=60.0)
    with_leader(run)
    run.start("other")
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: step_of(broker) >= 2)
        assert redis_server.pid is not None
        os.kill(redis_server.pid, signal.SIGKILL)
        time.sleep(1.5 * SILENT_S)
        until(redis_server.revive)
        check(run, undisturbed, "leader", "other")
        standing = broker.call(broker.broker.members.standing, "main")
        assert standing is not None
        assert standing.generation == 1


def test_replicas_outlive_a_redis_that_takes_no_writes(
    redis_server: EmbeddedRedis, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    """For longer than a replica may be silent."""
    run = make_run(redis_server.url, "refused", compute_s=0.05, silent_s=0.6, hold_s=20.0)
    with_leader(run)
    run.start("other")
    with connect_blocking(run.url, run.name) as broker:
        redis = broker.broker.redis
        until(lambda: step_of(broker) >= 2)
        broker.call(redis.config_set, "min-replicas-to-write", 1)
        beat = newest_beat(broker)
        until(lambda: time.time() - beat > 1.0)
        assert newest_beat(broker) == beat
        broker.call(redis.config_set, "min-replicas-to-write", 0)
        check(run, undisturbed, "leader", "other")


def newest_beat(broker: BlockingBroker) -> float:
    return max(member.heartbeat for member in broker.call(broker.broker.members.members, "main"))


def test_replicas_meet_and_train_on_a_full_redis(
    redis_server: EmbeddedRedis, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    run = make_run(redis_server.url, "full", compute_s=0.05)
    with connect_blocking(run.url, run.name) as broker:
        broker.call(broker.broker.redis.config_set, "maxmemory", 1)
        with_leader(run)
        run.start("other")
        check(run, undisturbed, "leader", "other")


def test_what_stops_leaves_its_groups_to_the_others(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run], undisturbed: list[tuple[int, str]]
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.05)
    with_leader(run)
    run.start("other")
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: step_of(broker) >= 2)
        run.processes["leader"].terminate()
        assert run.exit_of("leader") == 0, run.log("leader")
    check(run, undisturbed, "other")


def test_a_reset_run_stops_its_replicas_with_a_reason(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run]
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.05)
    with_leader(run)
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: step_of(broker) >= 1)
        broker.call(broker.broker.reset)
    assert run.exit_of("leader") == 1
    assert "was reset" in run.log("leader")

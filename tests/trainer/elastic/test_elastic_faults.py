"""Replicas of one policy that fall silent, come late, are slow, or lose their Redis: the same weights as without."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from elastic_run import SILENT_S, STEPS, Run, check, ledger_of, step_of, trained_alone, versions_of, with_leader
from trainer_kit import is_stopped, until

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking
from lachesis.broker.audit import audit
from lachesis.broker.retention.dead_letters import Letter

pytestmark = pytest.mark.verl


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
        lock = broker.broker.registry.writer("main", ttl_s=60)
        until(lambda: broker.call(lock.acquire, blocking=False))
        before = step_of(broker)
        os.kill(leader.pid, signal.SIGCONT)
        until(lambda: not broker.call(broker.broker.members.members, "main"))
        assert step_of(broker) == before
        broker.call(lock.release)
        run.queue(STEPS)
        check(run, undisturbed, "leader")
        epoch_state = broker.call(broker.broker.members.epoch_state, "main")
        assert epoch_state is not None
        assert epoch_state.generation == 2


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
        epoch_state = broker.call(broker.broker.members.epoch_state, "main")
        assert epoch_state is not None
        assert epoch_state.generation == 1


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


@pytest.mark.parametrize("lost", [True, False], ids=["data_deleted", "batch_taken_apart"])
def test_a_step_that_can_be_trained_no_more_is_passed_over_and_told(
    shared_redis: EmbeddedRedis, run_name: str, make_run: Callable[..., Run], lost: bool
) -> None:
    """By hand, or by the trainer of another policy; when its groups are to be claimed, or some are in the sums already."""
    run = make_run(shared_redis.url, run_name, compute_s=0.02, silent_s=60.0, steps=STEPS + 1, queued=1)
    with_leader(run, stop_at="leased:2" if lost else "claimed:2")
    leader = run.processes["leader"]
    for name in ("r1", "r2"):
        run.start(name)
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: [m.step >= 0 for m in broker.call(broker.broker.members.members, "main")] == [True] * 3)
        run.queue(run.steps)
        until(lambda: is_stopped(leader))
        batch = broker.call(broker.broker.queue.batch, 2)
        assert batch is not None
        if lost:
            assert broker.call(broker.broker.redis.delete, broker.broker.keys.blob(batch.gids[-1])) == 1
        else:
            broker.call(take_apart, broker, 2)
        assert leader.pid is not None
        os.kill(leader.pid, signal.SIGCONT)
        for name in run.processes:
            assert run.exit_of(name) == 0, run.log(name)
        ledger = ledger_of(broker)
        assert [entry.step for entry in ledger] == [1, *range(3, STEPS + 2)]
        assert versions_of(broker) == trained_alone(ledger)
        letters = broker.call(broker.broker.dead.accepted)
        assert [(letter.entry.gid, letter.entry.reason) for letter in letters] == [(batch.gids[-1], "lost")] * lost
        events = broker.call(broker.broker.redis.xrange, broker.broker.keys.control)
        [told] = [fields[b"detail"].decode() for _, fields in events if fields[b"event"] == b"closed"]
        assert told.startswith("step 2, ")
        assert (batch.gids[-1] in told) == lost
        findings = broker.call(audit, broker.broker).findings
        assert findings == [f"groups waiting without their data: {batch.gids[-1]}"] * lost
        for letter in letters:
            broker.call(give_up, broker, letter)
        assert broker.call(audit, broker.broker).findings == []


async def give_up(broker: BlockingBroker, letter: Letter) -> None:
    assert await broker.broker.dead.purge(letter, who="a test")


async def take_apart(broker: BlockingBroker, step: int) -> None:
    assert (await broker.broker.queue.refit("main", apart=[step])).batches == 1

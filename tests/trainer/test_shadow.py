"""Trainers of shadows, which train along on the batches of `main`'s trainer; killed, and left behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from trainer_kit import fill, until
from verl_run import BATCH, GROUP, STEPS, Run, ledger, same, versions

from lachesis.broker import BlockingBroker, EmbeddedRedis
from lachesis.broker.audit import audit

pytestmark = pytest.mark.verl

SHADOW = ("lachesis.policy=shadow", "lachesis.shadow=lossless", "lachesis.max_behind=2")
LOSSY = ("lachesis.policy=shadow", "lachesis.shadow=lossy", "lachesis.max_behind=1", "lachesis.checkpoint_every=4")


def check_clean(blocking: BlockingBroker) -> None:
    for policy in ("main", "shadow"):
        assert blocking.call(audit, blocking.broker, policy).findings == []


@pytest.fixture
def a_run(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path) -> Run:
    return Run(shared_redis.url, run_name, tmp_path, tiny_model)


def test_a_lossless_shadow_killed_again_and_again_is_waited_for(a_run: Run) -> None:
    """With the same settings it becomes the same policy, bit for bit."""
    with a_run.broker() as blocking:
        queue, registry = blocking.broker.queue, blocking.broker.registry
        blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP)
        shadow = a_run.start(*SHADOW, crash_at="trained:1", log="shadow.log")
        until(lambda: blocking.call(queue.readers) == ["shadow"])
        assert blocking.call(registry.trainer_config) is None
        assert blocking.call(queue.status).formed == 0  # batches are another policy's to ask for
        main = a_run.start()
        assert a_run.finish(shadow) == -signal.SIGKILL
        until(lambda: len(blocking.call(ledger, blocking.broker, "main")) == 2)
        reading = blocking.call(queue.shadows.readings)[-1]
        assert (reading.policy, reading.behind, reading.holds) == ("shadow", 2, True)
        for point in ("committed:2", "publish:3", "checkpoint:4", "announce:5"):
            assert a_run.finish(a_run.start(*SHADOW, crash_at=point, log="shadow.log")) == -signal.SIGKILL, point
        assert a_run.finish(a_run.start(*SHADOW, log="shadow.log")) == 0
        assert a_run.finish(main) == 0

        theirs, mine = (blocking.call(ledger, blocking.broker, policy) for policy in ("main", "shadow"))
        assert [entry.step for entry in mine] == [*range(1, STEPS + 1)]
        assert [(e.gids, e.lag, e.loss) for e in mine] == [(e.gids, e.lag, e.loss) for e in theirs]
        assert blocking.call(versions, blocking.broker, "shadow") == [*range(STEPS + 1)]
        for version in range(STEPS + 1):
            assert same(a_run.weights(version, "shadow"), a_run.weights(version, "main")), version
        check_clean(blocking)
        assert blocking.call(queue.batches) == []
        metrics = [fields for _, fields in blocking.call(blocking.broker.journal.metrics)]
        assert {(each["kind"], each["policy"]) for each in metrics} == {("step", "main"), ("shadow", "shadow")}


def test_a_lossy_shadow_that_was_away_replays_what_it_had_and_skips_the_rest(a_run: Run, tmp_path: Path) -> None:
    with a_run.broker() as blocking:
        queue = blocking.broker.queue
        blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP)
        waiting = a_run.start(*LOSSY, crash_at="committed:2", log="shadow.log")
        until(lambda: blocking.call(queue.readers) == ["shadow"])
        waiting.kill()
        waiting.join()
        assert a_run.finish(a_run.start("lachesis.num_steps=2")) == 0
        assert a_run.finish(a_run.start(*LOSSY, crash_at="committed:2", log="shadow.log")) == -signal.SIGKILL
        assert a_run.finish(a_run.start()) == 0  # nobody waits for it
        assert [batch.step for batch in blocking.call(queue.batches)] == [2, 6]  # what it needs, and may still train
        check_clean(blocking)
        assert a_run.finish(a_run.start(*LOSSY, log="shadow.log")) == 0
        trained = blocking.call(ledger, blocking.broker, "shadow")
        assert [(entry.step, entry.v_before, entry.lag) for entry in trained] == [(2, 0, 1), (6, 2, 5)]
        assert blocking.call(versions, blocking.broker, "shadow") == [0, 2, 6]
        check_clean(blocking)
        assert blocking.call(audit, blocking.broker, "shadow").skipped == 4 * BATCH // GROUP
        assert blocking.call(queue.batches) == []
    assert "replayed" in (a_run.state_dir / "shadow.log").read_text()

    other = Run(a_run.url, f"{a_run.name}-other", tmp_path / "other", a_run.model)
    with other.broker() as blocking:  # a trainer that gets these two batches alone
        for step in (2, 6):
            blocking.call(fill, blocking.broker, groups=BATCH // GROUP, first=(step - 1) * BATCH // GROUP)
        assert other.finish(other.start("lachesis.num_steps=2")) == 0
    assert same(a_run.weights(6, "shadow"), other.weights(2))


def test_replicas_train_a_shadow_together_and_nobody_waits_when_they_are_done(a_run: Run) -> None:
    with a_run.broker() as blocking:
        blocking.call(fill, blocking.broker, groups=STEPS * BATCH // GROUP)
        options = (*SHADOW, "lachesis.elastic=true", "lachesis.num_steps=3")
        two = [a_run.start(*options, f"lachesis.replica={name}", log=f"{name}.log") for name in "ab"]
        until(lambda: blocking.call(blocking.broker.queue.readers) == ["shadow"])
        assert a_run.finish(a_run.start()) == 0
        assert [a_run.finish(process) for process in two] == [0, 0]
        theirs, mine = (blocking.call(ledger, blocking.broker, policy) for policy in ("main", "shadow"))
        assert [entry.step for entry in theirs] == [*range(1, STEPS + 1)]
        assert [(entry.gids, entry.lag) for entry in mine] == [(entry.gids, entry.lag) for entry in theirs[:3]]
        check_clean(blocking)
    found, expected = a_run.weights(3, "shadow"), a_run.weights(3, "main")
    assert all(found[name].sub(expected[name]).abs().max() < 1e-3 for name in expected)

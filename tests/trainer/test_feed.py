"""The next batch is ready when its turn comes, and until then nobody notices that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import fill, until

from lachesis.broker import BlockingBroker, Conflict
from lachesis.broker.records.steps import BatchEntry, Lease, LedgerEntry
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.collate import to_batch
from lachesis.trainer.prefetch import Prefetcher, PreparedBatch, noticing_resets
from lachesis.trainer.writer_lock import WriterLease

BATCH, GROUPS = 8, 2  # sequences and groups of a step


@pytest.fixture
def plan(configured: Callable[..., object], tmp_path: Path, run_name: str) -> Plan:
    from lachesis.trainer.config.plan import make_plan
    from lachesis.trainer.settings import TrainerSettings

    config = configured(f"lachesis.batch_size={BATCH}", "lachesis.num_steps=4", "lachesis.replica=me")
    return make_plan(config, TrainerSettings(state_dir=tmp_path, run=run_name))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def subscribed(blocking: BlockingBroker) -> None:
    blocking.call(blocking.broker.queue.subscribe, "main")


@pytest.fixture
def feed_of(blocking: BlockingBroker) -> Iterator[Callable[[Plan], Prefetcher]]:
    with WriterLease(blocking, "main", ttl_s=30) as writer_lease:
        yield lambda plan: Prefetcher(
            blocking, plan, writer_lease, partial(to_batch, vocab_size=320, max_tokens=plan.max_token_len)
        )


def never() -> bool:
    return False


def formed(blocking: BlockingBroker) -> int:
    return blocking.call(blocking.broker.queue.status).formed


def take(prefetcher: Prefetcher, after: int) -> tuple[Lease, PreparedBatch]:
    found = prefetcher.next(after, never)
    assert found is not None
    assert found[1].entry == found[0].batch
    assert len(found[1].batch.scores) == BATCH
    return found


def commit(blocking: BlockingBroker, lease: Lease) -> None:
    batch = lease.batch
    entry = LedgerEntry(batch.step, batch.gids, batch.n, batch.tok, 0, 0, 0, 0, lease.consumer, 0.0, 0.0, 0.0)
    blocking.call(blocking.broker.queue.commit, "main", lease, entry)


def test_the_next_batch_is_ready_and_still_counts_as_queued(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan
) -> None:
    broker = blocking.broker
    blocking.call(fill, broker, groups=2 * GROUPS)
    with feed_of(plan) as prefetcher:
        first, _ = take(prefetcher, 0)
        until(lambda: prefetcher._ahead and prefetcher._ahead.done())
        status = blocking.call(broker.queue.status)
        assert (status.formed, status.delivered, status.groups) == (2, 0, 2 * GROUPS)  # the publisher delivers
        pending = blocking.call(broker.redis.xpending_range, broker.keys.batches, "main", "-", "+", 9)
        assert [entry["message_id"] for entry in pending] == [b"1-0"]
        upcoming = blocking.call(broker.queue.upcoming, "main", 1)
        assert upcoming is not None
        blocking.call(broker.redis.unlink, *map(broker.keys.blob, upcoming.gids))  # it has them already
        commit(blocking, first)
        second, ready = take(prefetcher, 1)
        assert (second.batch.step, second.deliveries, [group.gid for group in ready.groups]) == (
            2,
            1,
            list(upcoming.gids),
        )


def test_it_is_made_while_a_step_trains_from_what_comes_then(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan
) -> None:
    blocking.call(fill, blocking.broker, groups=GROUPS)
    with feed_of(plan) as prefetcher:
        take(prefetcher, 0)
        blocking.call(fill, blocking.broker, groups=GROUPS, first=100)
        until(lambda: formed(blocking) == 2)


@pytest.mark.parametrize("changes", [{"prefetch": 0}, {"num_steps": 1}], ids=["turned off", "after the last step"])
def test_nothing_is_made_ready_where_nothing_should(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan, changes: dict[str, Any]
) -> None:
    blocking.call(fill, blocking.broker, groups=2 * GROUPS)
    with feed_of(replace(plan, **changes)) as prefetcher:
        lease, _ = take(prefetcher, 0)
        assert prefetcher._ahead is None
        commit(blocking, lease)
        assert formed(blocking) == 1
        assert take(prefetcher, 1)[0].batch.step == 2


def test_what_another_reader_took_meanwhile_is_thrown_away(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan
) -> None:
    blocking.call(fill, blocking.broker, groups=3 * GROUPS)
    with feed_of(plan) as prefetcher:
        first, _ = take(prefetcher, 0)
        until(lambda: prefetcher._ahead and prefetcher._ahead.done())
        theirs = blocking.call(blocking.broker.queue.lease, "main", "other", lapse_s=600)
        assert theirs is not None
        assert theirs.batch.step == 2
        commit(blocking, theirs)
        commit(blocking, first)
        assert take(prefetcher, 1)[0].batch.step == 3


def test_a_batch_given_up_on_leasing_is_followed_by_the_next(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan
) -> None:
    """Also where another policy still wants it, so that it stays among the batches."""
    blocking.call(blocking.broker.queue.subscribe, "shadow")
    blocking.call(fill, blocking.broker, groups=GROUPS)
    for _ in range(2):
        blocking.call(blocking.broker.queue.lease_or_form, "main", "dead", BATCH, lapse_s=0)
    with feed_of(replace(plan, max_deliveries=2)) as prefetcher:
        assert prefetcher.next(0, lambda: formed(blocking) == 1 and _none_pending(blocking)) is None
        blocking.call(fill, blocking.broker, groups=GROUPS, first=100)
        assert take(prefetcher, 0)[0].batch.step == 2


def _none_pending(blocking: BlockingBroker) -> bool:
    pending = blocking.call(blocking.broker.redis.xpending, blocking.broker.keys.batches, "main")
    return bool(pending["pending"] == 0)


def test_waiting_ends_when_asked_or_when_the_run_is_reset(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan
) -> None:
    asked = iter([False, False, True])
    with feed_of(plan) as prefetcher:
        assert prefetcher.next(0, lambda: next(asked)) is None
        blocking.call(blocking.broker.reset)
        with pytest.raises(Conflict, match="was reset while policy 'main' was trained"):
            prefetcher.next(0, never)


def test_groups_that_are_gone_are_told(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan
) -> None:
    entry = BatchEntry(3, ("a",), 1, 1, 0, 0, 0.0)
    with feed_of(plan) as prefetcher, pytest.raises(Conflict, match=r"step 3 can't be trained: group a has no blob"):
        prefetcher.load(entry)


def test_a_batch_of_another_size_or_with_groups_that_are_gone_is_made_anew(
    blocking: BlockingBroker, feed_of: Callable[[Plan], Prefetcher], plan: Plan
) -> None:
    """The first was formed for the trainer before, the second has lost its data."""
    broker = blocking.broker
    blocking.call(fill, broker, groups=3 * GROUPS)
    assert blocking.call(broker.queue.form, 2 * BATCH) == 1
    assert blocking.call(broker.queue.lease, "main", "before", lapse_s=600)
    with feed_of(plan) as prefetcher:
        first, _ = take(prefetcher, 0)
        assert first.batch.step == 2
        until(lambda: formed(blocking) == 3)
        until(lambda: prefetcher._ahead and prefetcher._ahead.done())
    commit(blocking, first)
    upcoming = blocking.call(broker.queue.batch, 3)
    assert upcoming is not None
    blocking.call(broker.redis.unlink, broker.keys.blob(upcoming.gids[0]))
    with feed_of(plan) as prefetcher:
        second, ready = take(prefetcher, 2)
        assert second.batch.step == 4
        assert upcoming.gids[1] in [group.gid for group in ready.groups]
    assert [letter.entry.reason for letter in blocking.call(broker.dead.accepted)] == ["lost"]


def test_a_reset_between_two_commands_is_noticed(blocking: BlockingBroker, plan: Plan) -> None:
    blocking.call(blocking.broker.reset)
    with pytest.raises(Conflict, match="was reset while policy 'main' was trained"), noticing_resets(plan.run, "main"):
        blocking.call(blocking.broker.redis.xinfo_groups, blocking.broker.keys.batches)

"""Publishing in the background: in order, one at a time, apart from training, and its failures reach the caller."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_kit import fill, until

from lachesis.broker import BlockingBroker, LeaseLost, StorageError, WeightsRefused
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry
from lachesis.trainer.weights.publisher import Publisher
from lachesis.trainer.weights.versions import VersionStore
from lachesis.trainer.writer_lock import WriterLease


class SlowStore(VersionStore):
    """A store whose disk waits until it is let go."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model, dtype="fp32")
        self.writing, self.let_go = threading.Event(), threading.Event()

    def write(self, *args: Any, **more: Any) -> WeightsEntry:
        self.writing.set()
        assert self.let_go.wait(30)
        return super().write(*args, **more)


@pytest.fixture
def writer_lease(blocking: BlockingBroker) -> Iterator[WriterLease]:
    with WriterLease(blocking, "main", ttl_s=3) as held:
        assert held.wait(unless=lambda: False, on_standby=lambda: None)
        yield held


@pytest.fixture
def store(tmp_path: Path, tiny_model: Path) -> SlowStore:
    return SlowStore(tmp_path / "weights", tiny_model)


@pytest.fixture
def publisher(blocking: BlockingBroker, writer_lease: WriterLease, store: SlowStore) -> Iterator[Publisher]:
    with Publisher(blocking, "main", store, writer_lease, keep_versions=2) as made:
        yield made
        store.let_go.set()


def weights(value: float) -> list[tuple[str, Tensor]]:
    return [("a.weight", torch.full((2,), value))]


def announced(blocking: BlockingBroker) -> int:
    newest = blocking.call(blocking.broker.weights.newest, "main")
    return newest.version if newest else -1


def test_training_does_not_wait_for_the_disk(publisher: Publisher, store: SlowStore, blocking: BlockingBroker) -> None:
    publisher.publish(1, 0, weights(1.0))
    assert store.writing.wait(30)
    publisher.check()  # the caller is free, and nothing is announced
    assert (publisher.newest, announced(blocking)) == (-1, -1)
    store.let_go.set()
    publisher.publish(2, 1, weights(2.0))  # waits for version 1, not for 2
    assert announced(blocking) >= 1
    publisher.flush()
    assert (publisher.newest, announced(blocking), store.versions()) == (2, 2, [1, 2])
    entry = blocking.call(blocking.broker.weights.get, "main", 2)
    assert entry is not None
    assert entry.parent == 1
    publisher.publish(3, 2, weights(3.0))
    publisher.flush()
    assert store.versions() == [2, 3]  # no server has 1


def test_a_batch_counts_as_queued_until_the_versions_before_it_are_out(
    publisher: Publisher, store: SlowStore, blocking: BlockingBroker
) -> None:
    queue = blocking.broker.queue
    blocking.call(fill, blocking.broker, groups=2)
    assert [blocking.call(queue.form, 4) for _ in range(2)] == [1, 2]
    publisher.deliver(1)  # nothing is in work
    publisher.flush()
    publisher.publish(1, 0, weights(1.0))
    publisher.deliver(2)
    assert store.writing.wait(30)
    assert blocking.call(queue.status).delivered == 1
    store.let_go.set()
    publisher.flush()
    status = blocking.call(queue.status)
    assert (status.delivered, status.groups) == (2, 0)


def test_in_lockstep_it_counts_as_queued_until_servers_have_the_version(
    publisher: Publisher, store: SlowStore, blocking: BlockingBroker
) -> None:
    queue, registry = blocking.broker.queue, blocking.broker.registry
    blocking.call(fill, blocking.broker, groups=2)
    assert [blocking.call(queue.form, 4) for _ in range(2)] == [1, 2]

    def report(server: str, state: str, version: int, *, heard: float = 0.0) -> None:
        blocking.call(
            registry.report, ServerStatus(server, "main", "http://s", state, version, -1, time.time() - heard)
        )

    def delivered() -> int:
        return blocking.call(queue.status).delivered

    report("dead", "ready", 0, heard=60.0)
    report("failed", "failed", 0)
    refusing = ServerStatus("refusing", "main", "http://s", "ready", 0, -1, time.time(), last_error="version 1 refused")
    blocking.call(registry.report, refusing)  # it will never have it
    report("behind", "ready", 0)
    store.let_go.set()
    publisher.publish(1, 0, weights(1.0))
    publisher.deliver(1, served=True)
    until(lambda: announced(blocking) == 1)
    report("behind", "updating", 0)
    time.sleep(0.2)
    assert delivered() == 0
    report("behind", "ready", 1)
    until(lambda: delivered() == 1)
    publisher.publish(2, 1, weights(2.0))
    publisher.deliver(2, served=True)
    publisher.flush(hurry=True)  # nobody waits for a server at the end
    assert delivered() == 2


def test_a_pinned_pool_is_not_waited_for_and_keeps_its_version(
    publisher: Publisher, store: SlowStore, blocking: BlockingBroker
) -> None:
    store.let_go.set()
    for version in (1, 2):
        publisher.publish(version, version - 1, weights(float(version)))
    publisher.flush()
    pools, registry = blocking.broker.pools, blocking.broker.registry
    judged, _ = blocking.call(pools.rule, "main")
    assert blocking.call(pools.set_rule, "main", PoolRule("canary", 2, 1, 0.5), judged)
    pinned = ServerStatus("s", "main", "http://s", "ready", 2, -1, time.time(), rule="canary")
    blocking.call(registry.report, pinned)  # nobody serves version 1 now, and somebody may have to soon
    for version in (3, 4):
        publisher.publish(version, version - 1, weights(float(version)))
        publisher.deliver(version, served=True)
    publisher.flush()
    assert store.versions() == [1, 2, 3, 4]


def test_a_failed_write_is_raised_once_by_the_next_call(
    publisher: Publisher, store: SlowStore, blocking: BlockingBroker
) -> None:
    store.let_go.set()
    shutil.rmtree(store.folder)
    publisher.publish(1, 0, weights(1.0))
    with pytest.raises(StorageError, match="version 1 can't be written"):
        publisher.publish(2, 1, weights(2.0))
    publisher.flush()
    assert announced(blocking) == -1


def test_weights_that_are_not_finite_are_refused_at_once(publisher: Publisher, blocking: BlockingBroker) -> None:
    with pytest.raises(WeightsRefused, match=r"version 1 .* a\.weight"):
        publisher.publish(1, 0, weights(float("nan")))
    publisher.flush()
    assert announced(blocking) == -1


def test_who_lost_the_lock_while_writing_announces_nothing(
    publisher: Publisher, store: SlowStore, writer_lease: WriterLease, blocking: BlockingBroker
) -> None:
    publisher.publish(1, 0, weights(1.0))
    assert store.writing.wait(30)
    blocking.call(blocking.broker.redis.set, blocking.broker.keys.writer("main"), "another")
    until(writer_lease._lost.is_set)
    store.let_go.set()
    with pytest.raises(LeaseLost, match="right to write policy 'main'"):
        publisher.flush()
    assert announced(blocking) == -1


def test_what_was_never_announced_is_removed_on_resuming(publisher: Publisher, store: SlowStore) -> None:
    store.let_go.set()
    for version in (1, 2):
        store.write(version, version, version - 1, store.copy(version, weights(1.0)))
    publisher.resume(1)
    assert (publisher.newest, store.versions()) == (1, [1])

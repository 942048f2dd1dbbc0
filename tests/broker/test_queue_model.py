"""The queue against a model of itself: any order of posts, leases, commits, lapses and retirements by several consumers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scored import group, trained

from lachesis.broker import EmbeddedRedis, LeaseLost, connect_blocking
from lachesis.broker.allot import choose
from lachesis.broker.audit import audit
from lachesis.broker.records import Lease

BATCH = 4
POLICIES = st.sampled_from(("main", "shadow"))
CONSUMERS = st.sampled_from(("a", "b"))
runs = itertools.count()


@dataclass
class Reader:
    """What one policy should see."""

    delivered: int = 0
    holder: dict[int, str] = field(default_factory=dict)  # step -> consumer
    committed: list[int] = field(default_factory=list)
    covered: int = 0


class QueueModel(RuleBasedStateMachine):
    url = ""

    @initialize(sizes=st.lists(st.integers(1, BATCH), min_size=4, max_size=12))
    def start(self, sizes: list[int]) -> None:
        self.stack = ExitStack()
        self.blocking = self.stack.enter_context(connect_blocking(self.url, f"model{next(runs)}"))
        self.broker, self.call = self.blocking.broker, self.blocking.call
        self.size: dict[str, int] = {}
        self.waiting: list[str] = []
        self.batches: dict[int, list[str]] = {}  # still kept
        self.formed = 0
        self.leases: list[tuple[str, Lease]] = []
        self.readers = {"main": Reader(), "shadow": Reader()}
        for policy in self.readers:
            self.call(self.broker.queue.subscribe, policy)
        for size in sizes:
            self.put_one(size, None)

    @rule(sizes=st.lists(st.integers(1, BATCH + 1), min_size=1, max_size=6), env=st.sampled_from((None, 0, 1)))
    def put(self, sizes: list[int], env: int | None) -> None:
        for size in sizes:
            self.put_one(size, env)

    def put_one(self, size: int, env: int | None) -> None:
        gid = f"g{len(self.size)}"
        scored = group(len(self.size), size, env)
        assert self.call(self.broker.queue.put, gid, scored, v_min=0, v_max=0) == "stored"
        self.size[gid] = size
        self.waiting.append(gid)

    @precondition(lambda self: self.size)
    @rule(data=st.data())
    def put_again(self, data: st.DataObject) -> None:
        gid = data.draw(st.sampled_from(sorted(self.size)))
        scored = group(int(gid[1:]), self.size[gid])
        assert self.call(self.broker.queue.put, gid, scored, v_min=0, v_max=0) == "duplicate"

    @rule(policy=POLICIES, consumer=CONSUMERS, lapsed=st.booleans())
    def lease(self, policy: str, consumer: str, lapsed: bool) -> None:
        queue, lapse_s = self.broker.queue, 0 if lapsed else 600
        found = self.call(queue.lease_or_form, policy, consumer, BATCH, lapse_s=lapse_s)
        step = self.expected_lease(self.readers[policy], consumer, lapsed)
        assert (found.batch.step if found else None) == step
        if found is not None:
            assert list(found.batch.gids) == self.batches[found.batch.step]
            self.leases.append((policy, found))

    def expected_lease(self, reader: Reader, consumer: str, lapsed: bool) -> int | None:
        own = sorted(step for step, holder in reader.holder.items() if holder == consumer)
        others = sorted(reader.holder) if lapsed else []
        if own or others:
            step = (own or others)[0]
        else:
            if reader.delivered == self.formed:
                chosen = choose([self.size[gid] for gid in self.waiting], BATCH)
                if chosen is None:
                    return None
                self.formed += 1
                self.batches[self.formed] = [self.waiting[index] for index in chosen]
                self.waiting = [gid for index, gid in enumerate(self.waiting) if index not in chosen]
            step = reader.delivered = reader.delivered + 1
        reader.holder[step] = consumer
        return step

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        policy, lease = data.draw(st.sampled_from(self.leases))
        reader, step = self.readers[policy], lease.batch.step
        mine = reader.holder.get(step) == lease.consumer
        try:
            self.call(self.broker.queue.commit, policy, lease, trained(lease.batch, lease.consumer))
        except LeaseLost:
            assert step in reader.holder
            assert not mine
        else:
            assert mine or step in reader.committed
            if mine:
                del reader.holder[step]
                reader.committed.append(step)

    def lost(self) -> list[tuple[str, Lease]]:
        return [
            (policy, lease)
            for policy, lease in self.leases
            if self.readers[policy].holder.get(lease.batch.step, lease.consumer) != lease.consumer
        ]

    @precondition(lambda self: self.lost())
    @rule(data=st.data())
    def commit_what_another_took_over(self, data: st.DataObject) -> None:
        policy, lease = data.draw(st.sampled_from(self.lost()))
        with pytest.raises(LeaseLost, match="another consumer took it"):
            self.call(self.broker.queue.commit, policy, lease, trained(lease.batch, lease.consumer))

    @rule(policy=POLICIES)
    def retire(self, policy: str) -> None:
        reader = self.readers[policy]
        settled = self.call(self.broker.queue.settled, policy)
        assert settled == min(reader.holder, default=reader.delivered + 1) - 1
        reader.covered = settled
        limit = min(reader.covered for reader in self.readers.values())
        freed = [step for step in self.batches if step <= limit]
        assert self.call(self.broker.queue.retire, policy, settled) == len(freed)
        for step in freed:
            del self.batches[step]

    @invariant()
    def counters_tell_the_truth(self) -> None:
        if not hasattr(self, "stack"):
            return
        status = self.call(self.broker.queue.status)
        delivered = max(reader.delivered for reader in self.readers.values())
        undelivered = [gid for step in range(delivered + 1, self.formed + 1) for gid in self.batches[step]]
        queued = [*self.waiting, *undelivered]
        assert (status.accepted, status.groups) == (len(self.size), len(queued))
        assert status.sequences == sum(self.size[gid] for gid in queued)
        assert (status.formed, status.delivered) == (self.formed, delivered)
        assert sum(size * count for size, count in status.sizes.items()) == sum(self.size[gid] for gid in self.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with self.stack:
            held = [gid for gids in self.batches.values() for gid in gids] + self.waiting
            assert [found.gid for found in self.call(self.broker.queue.fetch, held)] == held
            for policy, reader in self.readers.items():
                report = self.call(audit, self.broker, policy)
                assert report.findings == []
                assert (report.accepted, report.steps) == (len(self.size), len(reader.committed))


@pytest.fixture
def url(shared_redis: EmbeddedRedis) -> Iterator[str]:
    QueueModel.url = shared_redis.url
    yield shared_redis.url
    QueueModel.url = ""


@pytest.mark.usefixtures("url")
def test_the_queue_does_what_its_model_does() -> None:
    limits = settings(max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(QueueModel, settings=limits)  # type: ignore[no-untyped-call]

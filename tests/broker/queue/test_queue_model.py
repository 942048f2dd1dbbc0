"""The queue against a model of itself: any order of what posts, consumers and people do with it.

Posts within and over limits, leases, commits, lapses, batches lent too often, groups grown stale, retirements, dead
letters put back and given up; by several consumers of two policies.
"""

from __future__ import annotations

import itertools
from collections import Counter
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
from lachesis.broker.audit import audit
from lachesis.broker.queue.selection import select_batch
from lachesis.broker.records.groups import Limits
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.steps import Lease
from lachesis.broker.records.versions import WeightsEntry

BATCH, MAX_DELIVERIES = 4, 2
LIMITS = st.just(Limits()) | st.builds(
    Limits,
    bytes=st.sampled_from((0, 0, 400, 2000)),
    sequences=st.sampled_from((0, 0, 4, 9)),
    env_bytes=st.sampled_from((0, 0, 400, 1000)),
    env_sequences=st.sampled_from((0, 0, 3, 6)),
    max_lag=st.sampled_from((None, 0, 1, 3)),
)
POLICIES = st.sampled_from(("main", "shadow"))
CONSUMERS = st.sampled_from(("a", "b"))
runs = itertools.count()


@dataclass
class Reader:
    """What one policy should see."""

    delivered: int = 0
    holder: dict[int, str] = field(default_factory=dict)  # step -> consumer
    lent: Counter[int] = field(default_factory=Counter)  # step -> how often
    given_up: dict[int, list[str]] = field(default_factory=dict)  # step -> groups done without; none if they died
    committed: list[int] = field(default_factory=list)
    trainer: dict[int, str] = field(default_factory=dict)  # step -> the consumer that committed it
    covered: int = 0


class QueueModel(RuleBasedStateMachine):
    url = ""

    @initialize(sizes=st.lists(st.integers(1, BATCH), min_size=4, max_size=12))
    def start(self, sizes: list[int]) -> None:
        self.stack = ExitStack()
        self.blocking = self.stack.enter_context(connect_blocking(self.url, f"model{next(runs)}"))
        self.broker, self.call = self.blocking.broker, self.blocking.call
        self.numbers = itertools.count()
        self.size: dict[str, int] = {}  # of every accepted group
        self.env: dict[str, int | None] = {}
        self.bytes: dict[str, int] = {}
        self.v_min: dict[str, int] = {}
        self.version = self.max_lag = 0
        self.waiting: list[str] = []
        self.dead: list[str] = []
        self.purged: list[str] = []
        self.batches: dict[int, list[str]] = {}  # still kept
        self.formed = self.delivered = 0
        self.leases: list[tuple[str, Lease]] = []
        self.readers = {"main": Reader(), "shadow": Reader()}
        for policy in self.readers:
            self.call(self.broker.queue.subscribe, policy)
        self.call(self.broker.registry.register_trainer, TrainerConfig("g", "p", BATCH, 16, "", 1, 0, 1))
        for size in sizes:
            self.put_one(size, None, Limits())

    @rule(
        sizes=st.lists(st.integers(1, BATCH + 1), min_size=1, max_size=6),
        env=st.sampled_from((None, 0, 1)),
        limits=LIMITS,
        age=st.integers(0, 3),
    )
    def put(self, sizes: list[int], env: int | None, limits: Limits, age: int) -> None:
        for size in sizes:
            self.put_one(size, env, limits, age)

    def put_one(self, size: int, env: int | None, limits: Limits, age: int = 0) -> None:
        number = next(self.numbers)
        gid, v_min = f"g{number}", max(0, self.version - age)
        scored = group(number, size, env)
        reply = self.call(self.broker.queue.put, gid, scored, v_min=v_min, v_max=self.version, limits=limits)
        stored = self.call(self.broker.redis.strlen, self.broker.keys.blob(gid))
        assert reply == self.expected_reply(size, env, stored, limits)
        if reply == "stored":
            self.size[gid], self.env[gid], self.bytes[gid], self.v_min[gid] = size, env, stored, v_min
            self.waiting.append(gid)
            self.max_lag = self.max_lag if limits.max_lag is None else limits.max_lag

    def expected_reply(self, size: int, env: int | None, stored: int, limits: Limits) -> str:
        delivered = self.delivered
        waiting = sum(self.size[gid] for gid in self.waiting) + (self.formed - delivered) * BATCH
        if limits.max_lag and waiting >= limits.max_lag * BATCH:
            return "late"
        own = [gid for gid in self.waiting if self.env[gid] == env]
        for gids, bytes_, sequences, reply in (
            (self.waiting, limits.bytes, limits.sequences, "full"),
            (own, limits.env_bytes, limits.env_sequences, "env_full"),
        ):
            held_bytes, held = sum(self.bytes[gid] for gid in gids), sum(self.size[gid] for gid in gids)
            if gids and (0 < bytes_ < held_bytes + stored or 0 < sequences < held + size):
                return reply
        return "stored"

    @precondition(lambda self: self.size)
    @rule(data=st.data())
    def put_again(self, data: st.DataObject) -> None:
        gid = data.draw(st.sampled_from(sorted(self.size)))
        scored = group(int(gid[1:]), self.size[gid])
        assert self.call(self.broker.queue.put, gid, scored, v_min=0, v_max=0) == "duplicate"

    @rule(steps=st.integers(1, 2))
    def publish(self, steps: int) -> None:
        self.version += steps
        entry = WeightsEntry(self.version, self.version, "file:///v", "0", 1, "BF16", self.version - steps)
        self.call(self.broker.weights.publish, "main", entry)

    @rule(policy=POLICIES, consumer=CONSUMERS, lapsed=st.booleans(), delivered=st.booleans())
    def lease(self, policy: str, consumer: str, lapsed: bool, delivered: bool) -> None:
        queue, options = self.broker.queue, {"lapse_s": 0 if lapsed else 600, "max_deliveries": MAX_DELIVERIES}
        found = self.call(queue.lease, policy, consumer, delivered=delivered, **options)
        if found is None and self.call(queue.form, BATCH) is not None:
            found = self.call(queue.lease, policy, consumer, delivered=delivered, **options)
        step = self.expected_lease(self.readers[policy], consumer, lapsed)
        assert (found.batch.step if found else None) == step
        self.delivered = max(self.delivered, (step or 0) * delivered)
        if found is not None:
            assert list(found.batch.gids) == self.batches[found.batch.step]
            assert found.deliveries == self.readers[policy].lent[found.batch.step]
            self.leases.append((policy, found))

    @rule(step=st.integers(0, 9))
    def deliver(self, step: int) -> None:
        assert self.call(self.broker.queue.deliver, step) is (self.delivered < step <= self.formed)
        self.delivered = step if step <= self.formed and step > self.delivered else self.delivered

    def expected_lease(self, reader: Reader, consumer: str, lapsed: bool) -> int | None:
        while True:
            own = sorted(step for step, holder in reader.holder.items() if holder == consumer)
            others = sorted(reader.holder) if lapsed else []
            if not own and not others:
                break
            step = (own or others)[0]
            if reader.lent[step] == MAX_DELIVERIES:
                self.give_up(reader, step)
            else:
                break
        if not own and not others:
            if reader.delivered == self.formed:
                oversized = [gid for gid in self.waiting if self.size[gid] > BATCH]
                self.waiting = [gid for gid in self.waiting if gid not in oversized]
                self.dead += oversized
                chosen = self.choose()
                while chosen and self.drop_stale([self.waiting[index] for index in chosen]):
                    chosen = self.choose()
                if chosen is None:
                    return None
                self.formed += 1
                self.batches[self.formed] = [self.waiting[index] for index in chosen]
                self.waiting = [gid for index, gid in enumerate(self.waiting) if index not in chosen]
            step = reader.delivered = reader.delivered + 1
        reader.holder[step] = consumer
        reader.lent[step] += 1
        return step

    def give_up(self, reader: Reader, step: int) -> None:
        del reader.holder[step]
        reader.given_up[step] = self.batches[step]
        if all(step in each.given_up for each in self.readers.values()):
            self.dead += self.batches.pop(step)
            self.delivered = max(self.delivered, step)
            for each in self.readers.values():
                each.given_up[step] = []

    def choose(self) -> list[int] | None:
        sizes, envs = [self.size[gid] for gid in self.waiting], [self.env_name(gid) for gid in self.waiting]
        return select_batch(sizes, envs, BATCH, {}, self.counted(), self.formed + 1)

    def env_name(self, gid: str) -> str:
        return "-" if self.env[gid] is None else str(self.env[gid])

    def counted(self) -> dict[str, Counter[int]]:
        waiting: dict[str, Counter[int]] = {}
        for gid in self.waiting:
            waiting.setdefault(self.env_name(gid), Counter())[self.size[gid]] += 1
        return waiting

    def drop_stale(self, chosen: list[str]) -> bool:
        stale = [gid for gid in chosen if 0 < self.max_lag < self.version - self.v_min[gid]]
        self.waiting = [gid for gid in self.waiting if gid not in stale]
        self.dead += stale
        return bool(stale)

    @precondition(lambda self: self.dead)
    @rule(data=st.data(), again=st.booleans())
    def decide_about_a_dead_letter(self, data: st.DataObject, again: bool) -> None:
        gid = data.draw(st.sampled_from(self.dead))
        (letter,) = self.call(self.broker.dead.find, [gid])
        (kept,) = self.call(self.broker.queue.fetch, [gid])
        for expected in (True, False):
            if again:
                assert self.call(self.broker.dead.requeue, letter, kept, self.bytes[gid]) is expected
            else:
                assert self.call(self.broker.dead.purge, letter, who="test") is expected
        self.dead.remove(gid)
        (self.waiting if again else self.purged).append(gid)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        policy, lease = data.draw(st.sampled_from(self.leases))
        reader, step = self.readers[policy], lease.batch.step
        mine = reader.holder.get(step) == lease.consumer
        try:
            self.call(self.broker.queue.commit, policy, lease, trained(lease.batch, lease.consumer))
        except LeaseLost:
            assert step in reader.holder or step in reader.given_up or step in reader.committed
            assert not mine
            assert reader.trainer.get(step) != lease.consumer
        else:
            assert mine or reader.trainer[step] == lease.consumer
            if mine:
                del reader.holder[step]
                reader.committed.append(step)
                reader.trainer[step] = lease.consumer

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
        freed = [step for step in self.batches if step <= min(limit, self.delivered)]
        assert self.call(self.broker.queue.retire, policy, settled) == len(freed)
        for step in freed:
            del self.batches[step]

    @invariant()
    def counters_tell_the_truth(self) -> None:
        if not hasattr(self, "stack"):
            return
        status = self.call(self.broker.queue.status)
        delivered = self.delivered
        undelivered = [gid for step in range(delivered + 1, self.formed + 1) for gid in self.batches[step]]
        queued = [*self.waiting, *undelivered]
        assert (status.accepted, status.groups) == (len(self.size), len(queued))
        assert status.sequences == sum(self.size[gid] for gid in queued)
        assert (status.formed, status.delivered) == (self.formed, delivered)
        assert (status.dead, status.purged) == (len(self.dead), len(self.purged))
        assert status.waiting == self.counted()

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with self.stack:
            held = [gid for gids in self.batches.values() for gid in gids] + self.waiting + self.dead
            assert [found.gid for found in self.call(self.broker.queue.fetch, held)] == held
            for policy, reader in self.readers.items():
                report = self.call(audit, self.broker, policy)
                assert report.findings == []
                assert (report.accepted, report.steps) == (len(self.size), len(reader.committed))
                assert (report.dead, report.purged) == (len(self.dead), len(self.purged))
                assert report.skipped == sum(map(len, reader.given_up.values()))
                told = report.trained + report.open + report.queued + report.dead + report.purged + report.skipped
                assert told == report.accepted


@pytest.fixture
def url(shared_redis: EmbeddedRedis) -> Iterator[str]:
    QueueModel.url = shared_redis.url
    yield shared_redis.url
    QueueModel.url = ""


@pytest.mark.usefixtures("url")
def test_the_queue_does_what_its_model_does() -> None:
    limits = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(QueueModel, settings=limits)

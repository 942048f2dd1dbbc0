"""Replicas in any order of events: crashes, false evictions, rollbacks, stale beliefs, calls sent twice.

Each replica here does what a real one does, one call at a time, and may be left alone at any point for as long as the
search likes: it then acts on what it believed before. Its "weights" are the list of updates that it applied, an update
the list of groups that went into it. So whatever breaks the protocol shows as weights that the ledger does not explain.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from replicas import BATCH
from scored import group, trained

from lachesis.broker import EmbeddedRedis, LeaseLost, connect_blocking
from lachesis.broker.audit import audit
from lachesis.broker.errors import Moved
from lachesis.broker.records.steps import Membership
from lachesis.broker.replicas.members import CONSUMER, NO_WEIGHTS, Rendezvous

pytestmark = pytest.mark.slow

P = ParamSpec("P")
T = TypeVar("T")
Update = tuple[str, ...]
GROUPS, REPLICAS = 10, 3
PLACES = st.integers(0, REPLICAS - 1)
TWICE = st.booleans()
runs, lives = itertools.count(), itertools.count()


class Simulated:
    """What one replica believes and holds."""

    def __init__(self) -> None:
        self.id = f"r{next(lives)}"
        self.me: Membership | None = None
        self.rendezvous: Rendezvous | None = None
        self.weights: list[Update] | None = None
        self.generation = 0
        self.step = NO_WEIGHTS
        self.working, self.held, self.done = 0, {}, False  # type: int, dict[int, str], bool
        self.buffer: Update | None = None  # what all replicas of the epoch hold together

    def drop_work(self, step: int = 0) -> None:
        self.working, self.held, self.done, self.buffer = step, {}, False, None

    def apply(self) -> None:
        assert self.weights is not None
        assert self.buffer is not None
        self.weights = [*self.weights, self.buffer]
        self.step = self.working
        self.drop_work()


class Replicas(RuleBasedStateMachine):
    url = ""

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        self.blocking = self.stack.enter_context(connect_blocking(self.url, f"replicas{next(runs)}"))
        self.broker, self.members = self.blocking.broker, self.blocking.broker.members
        self.queue = self.broker.queue
        self.replicas = [Simulated() for _ in range(REPLICAS)]
        for number in range(GROUPS):
            self.call(False, self.queue.put, f"g{number}", group(number), v_min=0, v_max=0)
        self.call(False, self.queue.subscribe, "main")
        self.updates: dict[int, Update] = {}  # by step, as voted for

    def call(self, twice: bool, operation: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """`twice`: the first reply is lost."""
        if twice:
            self.blocking.call(operation, *args, **kwargs)
        return self.blocking.call(operation, *args, **kwargs)

    # -- what happens to replicas ---------------------------------------------------------------------------------

    @rule(place=PLACES)
    def crash(self, place: int) -> None:
        self.replicas[place] = Simulated()

    @rule(place=PLACES, twice=TWICE)
    def evict(self, place: int, twice: bool) -> None:
        """Rightly or not."""
        self.call(twice, self.members.evict, "main", silent_s=600, limits={self.replicas[place].id: 0})

    @rule()
    def evict_the_dead(self) -> None:
        living = {replica.id for replica in self.replicas}
        found = self.call(False, self.members.members, "main")
        limits = {member.id: 0.0 for member in found if member.id not in living}
        self.call(False, self.members.evict, "main", silent_s=600, limits=limits)

    @rule()
    def all_fall_silent(self) -> None:
        self.blocking.call(self.broker.redis.delete, self.broker.keys.writer("main"))

    @rule(place=PLACES, twice=TWICE)
    def beat(self, place: int, twice: bool) -> None:
        self.call(twice, self.members.beat, "main", self.replicas[place].id, hold_s=600)

    # -- what a replica does --------------------------------------------------------------------------------------

    @rule(place=PLACES, twice=TWICE, moves=st.integers(1, 6))
    def act(self, place: int, twice: bool, moves: int) -> None:
        for _ in range(moves):
            self.move(self.replicas[place], twice)

    @rule(twice=TWICE, rounds=st.integers(1, 8))
    def all_act(self, twice: bool, rounds: int) -> None:
        for _ in range(rounds):
            for replica in self.replicas:
                self.move(replica, twice)
            self.reduce()

    def move(self, replica: Simulated, twice: bool) -> None:
        try:
            if replica.me is None:
                self.enter(replica, twice)
            elif replica.rendezvous is None:
                self.meet(replica, replica.me, twice)
            elif replica.buffer is not None:
                self.vote(replica, replica.me, twice)
            else:
                self.work(replica, replica.me, replica.rendezvous, twice)
        except Moved:
            self.look_around(replica)
        except LeaseLost:
            replica.drop_work()

    def enter(self, replica: Simulated, twice: bool) -> None:
        if replica.buffer is not None:  # it was evicted while it waited for the others' votes
            epoch_state = self.call(False, self.members.epoch_state, "main")
            if epoch_state and (epoch_state.generation, epoch_state.step) == (replica.generation, replica.working):
                replica.apply()
        replica.drop_work()
        replica.id = f"r{next(lives)}"
        join = self.members.join
        replica.me = self.call(twice, join, "main", replica.id, generation=replica.generation, step=replica.step)
        if replica.me is None and not self.call(False, self.members.is_held, "main"):
            lock = self.broker.registry.writer("main", ttl_s=600)
            assert self.call(False, lock.acquire, blocking=False)
            lineage = self.ledger()
            replica.weights, replica.step = [gids for _, gids in lineage], lineage[-1][0] if lineage else 0
            token = lock.local.token.decode()
            found = self.members.start_generation
            replica.me = self.call(twice, found, "main", replica.id, token=token, step=replica.step, hold_s=600)
            assert replica.me is not None
        if replica.me is not None:
            replica.generation = replica.me.generation

    def meet(self, replica: Simulated, me: Membership, twice: bool) -> None:
        rendezvous = self.call(twice, self.members.rendezvous, me)
        if rendezvous is None:
            return
        current = [id_ for id_, step in rendezvous.steps.items() if step == rendezvous.step]
        if not current:
            return  # only time helps: they don't keep the lock
        if rendezvous.steps[replica.id] != rendezvous.step:
            donor = next((other for other in self.replicas if other.id == current[0]), None)
            if donor is None or donor.me is None or donor.me.epoch != me.epoch:
                return  # it does not answer
            assert donor.step == rendezvous.step
            assert donor.weights is not None
            replica.weights, replica.step = list(donor.weights), donor.step
            replica.drop_work()
            self.call(twice, self.members.mark_current, me, replica.step)
        replica.rendezvous = rendezvous

    def work(self, replica: Simulated, me: Membership, rendezvous: Rendezvous, twice: bool) -> None:
        epoch_state = self.call(False, self.members.epoch_state, "main")
        assert epoch_state is not None
        if not epoch_state.open:
            if next(iter(rendezvous.steps)) == me.id:
                lease = self.call(twice, self.queue.lease_or_form, "main", CONSUMER, BATCH, lapse_s=0, max_deliveries=0)
                if lease is not None:
                    self.call(twice, self.members.open_step, me, lease.batch.step)
            return
        if replica.working != epoch_state.open:
            replica.drop_work(epoch_state.open)
        claimed = self.call(twice, self.members.claim, me, replica.working, count=1, held=len(replica.held))
        replica.done = claimed is None
        replica.held.update(claimed.groups if claimed else ())

    @rule(place=PLACES, twice=TWICE)
    def close(self, place: int, twice: bool) -> None:
        """The step that it works on turns out to be of no use."""
        replica = self.replicas[place]
        if replica.me is None or replica.rendezvous is None or not replica.working or replica.done:
            return
        try:
            self.call(twice, self.members.close_step, replica.me, replica.working, why="a test")
        except Moved:
            self.look_around(replica)
        except LeaseLost:
            replica.drop_work()

    @rule()
    def reduce(self) -> None:
        """All members of an epoch are done, and can reach each other: each gets what they hold together."""
        for replica in self.replicas:
            if replica.me is None or replica.rendezvous is None or not replica.done:
                continue
            peers = [other for other in self.replicas if other.id in replica.rendezvous.steps]
            alike = all(
                other.done and other.working == replica.working and other.rendezvous and other.me
                and other.me.epoch == replica.me.epoch
                for other in peers
            )  # fmt: skip
            if alike and len(peers) == len(replica.rendezvous.steps):
                gids = tuple(sorted(gid for other in peers for gid in other.held.values()))
                for other in peers:
                    other.buffer = gids

    def vote(self, replica: Simulated, me: Membership, twice: bool) -> None:
        batch = self.call(False, self.queue.batch, replica.working)
        assert batch is not None
        assert replica.buffer is not None
        if self.call(twice, self.members.vote, me, replica.working, " ".join(replica.buffer), trained(batch)):
            assert self.updates.setdefault(replica.working, replica.buffer) == replica.buffer
            replica.apply()

    def look_around(self, replica: Simulated) -> None:
        """Its epoch is over."""
        epoch_state = self.call(False, self.members.epoch_state, "main")
        found = [member.id for member in self.call(False, self.members.members, "main")]
        replica.rendezvous = None
        if epoch_state is None or replica.id not in found or epoch_state.generation != replica.generation:
            replica.me = None
            return
        assert replica.me is not None
        if replica.buffer and epoch_state.step == replica.working and epoch_state.won == replica.me.epoch:
            replica.apply()
        replica.buffer, replica.done = None, False
        if replica.working != epoch_state.open:
            replica.drop_work()
        replica.me = Membership("main", replica.id, epoch_state.generation, epoch_state.epoch)

    # -- what must hold -------------------------------------------------------------------------------------------

    def ledger(self) -> list[tuple[int, Update]]:
        async def read() -> list[tuple[int, Update]]:
            return [(entry.step, tuple(sorted(entry.gids))) async for entry in self.queue.ledger("main")]

        return self.blocking.call(read)

    @invariant()
    def weights_are_what_the_ledger_says(self) -> None:
        ledger = self.ledger()
        assert [step for step, _ in ledger] == list(range(1, len(ledger) + 1))
        for step, update in self.updates.items():
            assert ledger[step - 1] == (step, update)
        epoch_state = self.call(False, self.members.epoch_state, "main")
        members = {member.id: member for member in self.call(False, self.members.members, "main")}
        for replica in self.replicas:
            member = members.get(replica.id)
            if not member or not epoch_state or member.step != epoch_state.step:
                continue
            weights = replica.weights or []
            if replica.step != epoch_state.step:  # the last vote was another's, and it does not know yet
                assert replica.me is not None
                assert replica.buffer is not None
                assert (replica.working, replica.me.epoch) == (epoch_state.step, epoch_state.won)
                weights = [*weights, replica.buffer]
            assert weights == [update for _, update in ledger]

    def teardown(self) -> None:
        """Whatever happened, two more replicas get everything trained."""
        self.replicas = [Simulated(), Simulated()]
        for _ in range(100):
            self.evict_the_dead()
            if not self.call(False, self.members.members, "main"):
                self.all_fall_silent()
            epoch_state = self.call(False, self.members.epoch_state, "main")
            found = self.call(False, self.members.members, "main")
            if epoch_state and all(member.step != epoch_state.step for member in found):
                self.all_fall_silent()
                self.call(False, self.members.evict, "main", silent_s=0)
            if len(self.ledger()) == GROUPS * 2 // BATCH:
                break
            self.all_act(False, 1)
        assert len(self.ledger()) == GROUPS * 2 // BATCH
        assert self.blocking.call(audit, self.broker).findings == []
        self.stack.close()


def test_each_group_is_in_one_committed_step_and_in_everyones_weights(shared_redis: EmbeddedRedis) -> None:
    class OnThisServer(Replicas):
        url = shared_redis.url

    run_state_machine_as_test(
        OnThisServer,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )

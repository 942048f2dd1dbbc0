"""One of several replicas that train a policy together: one optimizer trajectory, however many there are and who dies.

A step, for each replica: claim groups and accumulate their gradients until all are claimed; sum over the replicas; vote;
when the last vote has committed the step, apply the sum. Whoever dies before its vote leaves groups behind that the
others claim; nobody else's gradients are lost, as what is summed is a copy. Whoever dies after the commit is not missed.
A step that can't be trained as it is, such as one with a group whose data was deleted, is begun anew from what there is.
Between steps all replicas hold the same weights, bit for bit, so a new one gets them from any other.

Protocol and proofs by test: broker/replicas/members.py. What is computed, and by what, only `GradientAccumulator` knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from msgspec import structs
from torch import Tensor

from lachesis.broker import BlockingBroker, LeaseLost
from lachesis.broker.errors import Moved
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.broker.records.steps import BatchEntry, LedgerEntry, Membership
from lachesis.broker.replicas.members import NO_WEIGHTS, Rendezvous
from lachesis.trainer.data.policy_lag import lag_of
from lachesis.trainer.elastic.accumulator import GradientAccumulator
from lachesis.trainer.elastic.claims import ClaimPolicy, Claims
from lachesis.trainer.elastic.collectives.base import Alone, PeerLost, Reducer
from lachesis.trainer.elastic.collectives.rendezvous import connect
from lachesis.trainer.elastic.config import ElasticConfig, LeaderTasks, StepRecord
from lachesis.trainer.elastic.membership import GroupMembership, Stopped, pause
from lachesis.trainer.elastic.next_batch import BatchOpener
from lachesis.trainer.elastic.step_sums import digest, sum_over_replicas

FORM_S = 0.25  # the leader waits so long for rollouts before it looks around


class ElasticReplica:
    """`with ElasticReplica(…) as replica: replica.train()`."""

    def __init__(
        self,
        broker: BlockingBroker,
        config: ElasticConfig,
        name: str,
        accumulator: GradientAccumulator,
        make_leader: Callable[[GroupMembership], LeaderTasks],
        stopping: Callable[[], bool],
    ) -> None:
        self._broker, self._members = broker, broker.broker.members
        self._config, self._accumulator = config, accumulator
        self.membership = GroupMembership(broker, config, name, stopping)
        self._leader = make_leader(self.membership)
        self.step = NO_WEIGHTS  # of the weights in memory
        self._generation = 0  # that they belong to
        self._rendezvous: Rendezvous | None = None
        self._reducer: Reducer = Alone()
        self._batch: BatchEntry | None = None  # the step in work
        self._opened: BatchEntry | None = None  # the one after it, by this replica
        self._held: dict[int, bytes] = {}  # its groups in this replica's sums: place → what is told of it
        self._opener, self._claim_policy = BatchOpener(broker, config), ClaimPolicy()
        self._summed: tuple[list[Tensor], list[bytes]] | None = None  # of all replicas, while they vote
        self._done_at = time.perf_counter()  # when the step before this one was done

    def __enter__(self) -> ElasticReplica:
        self.membership.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reducer.close()
        self._leader.resign()
        self.membership.__exit__(kind, error, trace)

    def train(self) -> None:
        """Train until the last step, or until asked to stop; what it has claimed then, others claim.

        Raises Conflict if the run was reset, Diverged if replicas disagree.
        """
        try:
            while self.step < self._config.num_steps:
                self.membership.check_stop()
                try:
                    self._go_on()
                except Moved:
                    self._move()
                except LeaseLost:  # another step is open by now
                    self._drop_work()
            # each that leaves sees that the last step was followed up, in case those before it died
            if self.membership.wait_to_lead():
                self._leader.follow_up(self.step)
                self._leader.finish(self.step)
        except Stopped:
            with suppress(LeaseLost):  # another replica leads by now, and saves
                if self._rendezvous is not None and self._leads(self._rendezvous):
                    self._leader.finish(self.step)

    def _go_on(self) -> None:
        try:
            if self.membership.me is None:
                self._enter()
            elif self._rendezvous is None:
                self._meet(self.membership.me)
            else:
                self._one_step(self.membership.me, self._rendezvous)
        except PeerLost:
            self._disconnect()
            self.membership.leave()

    # -- coming and going -----------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._drop_work()
        self._leader.resign()
        self.step = self.membership.join(self._generation, self.step, self._leader.resume)
        if self.membership.me is not None:
            self._generation = self.membership.me.generation

    def _move(self) -> None:
        """The epoch is over: go on in the next one, with the gradients of groups that are still this replica's."""
        self._disconnect()
        voted_in = self.membership.me
        epoch_state = self.membership.enter_next_epoch()
        if self._summed is not None and self._batch is not None and voted_in is not None:
            mine = (voted_in.generation, self._batch.step, voted_in.epoch)
            if (epoch_state.generation, epoch_state.step, epoch_state.won) == mine:  # committed, by the votes of others
                self._apply()
        self._summed = None
        if self._batch is not None and epoch_state.open != self._batch.step:  # it was closed: it may be opened again
            self._drop_work()

    def _meet(self, me: Membership) -> None:
        """Wait for all replicas, connect to them, and give the newest weights to those that lack them."""
        rendezvous = self.membership.rendezvous(me)
        current = [rank for rank, step in enumerate(rendezvous.steps.values()) if step == rendezvous.step]
        rank = list(rendezvous.steps).index(me.id)
        if len(rendezvous.steps) > 1:
            self._reducer = connect(
                self._config.backend, self._broker, me, rank, len(rendezvous.steps), self.membership.watch
            )
            self._accumulator.connect(me, rank, len(rendezvous.steps))
        failpoint("met", max(0, self.step))
        for other, step in enumerate(rendezvous.steps.values()):
            if step == rendezvous.step:
                continue
            if rank == current[0]:
                self._accumulator.send_state(self._reducer, other, self.membership.watch)
            elif rank == other:
                self._drop_work()
                self._accumulator.receive_state(self._reducer, current[0], self.membership.watch)
                self.step = rendezvous.step
                self._broker.call(self._members.mark_current, me, self.step)
                failpoint("healed", self.step)
        self._rendezvous = rendezvous
        self._claim_policy.met(len(rendezvous.steps))
        self._leader.met(rendezvous, me)
        if self._leads(rendezvous):
            self._leader.follow_up(self.step)  # what its predecessor did not get to

    def _disconnect(self) -> None:
        self._reducer.close()
        self._accumulator.disconnect()
        self._reducer, self._rendezvous, self._opened = Alone(), None, None

    def _leads(self, rendezvous: Rendezvous) -> bool:
        return self.membership.me is not None and next(iter(rendezvous.steps)) == self.membership.me.id

    # -- one step -------------------------------------------------------------------------------------------------

    def _one_step(self, me: Membership, rendezvous: Rendezvous) -> None:
        batch, leads = self._open(me, rendezvous), self._leads(rendezvous)
        began = time.perf_counter()
        if leads:
            self._opener.prepare(batch.step)
        with Claims(self._broker, self._config, me, batch, self._held, self._claim_policy) as claims:
            while groups := self._next(me, batch, claims):
                failpoint("claimed", batch.step)
                told = self._accumulator.accumulate(batch, groups)
                self._held.update(zip([place for place, _ in groups], told, strict=True))
                failpoint("accumulated", batch.step)
                self.membership.evict_silent()
        computed = time.perf_counter()
        failpoint("reducing", batch.step)
        sums, told = self._summed = sum_over_replicas(
            self._reducer, batch, self._accumulator, self._held, self._claim_policy, self.membership.watch
        )
        failpoint("reduced", batch.step)
        reduced = time.perf_counter()
        entry, letters = self._accumulator.entry(batch, self.step, sums, told)
        names = " ".join(sorted(id_.rsplit(":", 1)[0] for id_ in rendezvous.steps))
        lag = lag_of(batch, self.step, shadow=self._config.shadow)
        entry = structs.replace(entry, replica=names, lag=lag, seconds=reduced - began)
        if leads:
            self._leader.settle()
        mine = len(self._held)
        self._vote(me, entry, letters, digest(sums, told))
        failpoint("committed", batch.step)
        voted = time.perf_counter()
        self._apply()
        failpoint("applied", self.step)
        if leads:
            trained = StepRecord(
                entry=entry,
                letters=letters,
                told=told,
                groups=mine,
                replicas=len(rendezvous.steps),
                since=self._done_at,
                wait_s=began - self._done_at,
                reduce_s=reduced - computed,
                vote_s=voted - reduced,
            )
            if self.step < self._config.num_steps:
                self._opened = self._opener.open_next(me)  # for the others to go on, while this one has duties
            self._leader.report(trained)
            self._leader.follow_up(self.step)
        self._done_at = time.perf_counter()

    def _open(self, me: Membership, rendezvous: Rendezvous) -> BatchEntry:
        """The batch in work, once there is one. The first replica gets it lent for all."""
        leads, queue, since = self._leads(rendezvous), self._broker.broker.queue, time.monotonic()
        while self._opened is None:
            self.membership.watch()
            epoch_state = self._broker.call(self._members.epoch_state, self._config.policy)
            if epoch_state is not None and epoch_state.open:
                self._opened = self._broker.call(queue.batch, epoch_state.open)
                if self._opened is None:
                    self._close(me, epoch_state.open, "its batch was taken apart")
            elif leads:
                newest = self._broker.call(queue.newest_group)
                self._opened = self._opener.open_next(me)
                if self._opened is None:
                    self._broker.call(queue.wait_for_group, FORM_S, after=newest)
            else:
                pause(since)
        batch, self._opened = self._opened, None
        if self._batch is None or self._batch.step != batch.step:
            self._drop_work()
            self._batch = batch
        if leads:
            self._leader.opened(batch.step)
        return batch

    def _next(self, me: Membership, batch: BatchEntry, claims: Claims) -> list[tuple[int, Group]]:
        try:
            return claims.next()
        except LookupError as error:
            self.membership.check_epoch()  # evicted meanwhile: others have trained them by now, and a checkpoint has freed them
            self._close(me, batch.step, str(error))

    def _close(self, me: Membership, step: int, why: str) -> NoReturn:
        """The step can't be trained as it is. The first replica sees to that when all have met (see next_batch.py)."""
        self._broker.call(self._members.close_step, me, step, why=why)
        raise Moved(f"step {step} of policy {me.policy!r} was closed: {why}")

    def _vote(self, me: Membership, entry: LedgerEntry, letters: Sequence[DeadEntry], digest: str) -> None:
        """Returns when all have voted for the same sums: the step is committed."""
        vote, since = self._members.vote, time.monotonic()
        try:
            while not self._broker.call(vote, me, entry.step, digest, entry, untrainable=letters):
                failpoint("voted", entry.step)
                self.membership.watch()
                pause(since)
        except LeaseLost as error:  # its batch was taken apart, or is lent to others by now
            self._close(me, entry.step, str(error))

    def _apply(self) -> None:
        assert self._batch is not None
        assert self._summed is not None
        self._accumulator.apply(self._batch, *self._summed)
        self.step = self._batch.step
        self._batch, self._held, self._summed = None, {}, None

    def _drop_work(self) -> None:
        self._batch, self._opened, self._held, self._summed = None, None, {}, None
        self._accumulator.clear()

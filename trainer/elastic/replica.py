"""One of several replicas that train a policy together: one optimizer trajectory, however many there are and who dies.

A step, for each replica: claim groups and accumulate their gradients until all are claimed; sum over the replicas; vote;
when the last vote has committed the step, apply the sum. Whoever dies before its vote leaves groups behind that the
others claim; nobody else's gradients are lost, as what is summed is a copy. Whoever dies after the commit is not missed.
A step that can't be trained as it is, such as one with a group whose data was deleted, is begun anew from what there is.
Between steps all replicas hold the same weights, bit for bit, so a new one gets them from any other.

Protocol and proofs by test: broker/replicas/members.py. What is computed, and by what, only `Compute` knows.
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
from lachesis.broker.failpoints import crash_point
from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.broker.records.steps import BatchEntry, LedgerEntry, Membership
from lachesis.broker.replicas.members import NO_WEIGHTS, Meeting
from lachesis.trainer.data.policy_lag import lag_of
from lachesis.trainer.elastic.accumulator import Compute
from lachesis.trainer.elastic.claims import Claims, Pace
from lachesis.trainer.elastic.collectives.base import Alone, PeerLost, Reducer
from lachesis.trainer.elastic.collectives.rendezvous import connect
from lachesis.trainer.elastic.config import Duties, Team, Trained
from lachesis.trainer.elastic.membership import Seat, Stopped, pause
from lachesis.trainer.elastic.next_batch import Layout
from lachesis.trainer.elastic.step_sums import digest, sum_up

FORM_S = 0.25  # the leader waits so long for rollouts before it looks around


class ElasticReplica:
    """`with ElasticReplica(…) as replica: replica.train()`."""

    def __init__(
        self,
        broker: BlockingBroker,
        team: Team,
        name: str,
        compute: Compute,
        make_duties: Callable[[Seat], Duties],
        stopping: Callable[[], bool],
    ) -> None:
        self._broker, self._members = broker, broker.broker.members
        self._team, self._compute = team, compute
        self.seat = Seat(broker, team, name, stopping)
        self._duties = make_duties(self.seat)
        self.step = NO_WEIGHTS  # of the weights in memory
        self._generation = 0  # that they belong to
        self._meeting: Meeting | None = None
        self._reducer: Reducer = Alone()
        self._batch: BatchEntry | None = None  # the step in work
        self._laid_out: BatchEntry | None = None  # the one after it, by this replica
        self._held: dict[int, bytes] = {}  # its groups in this replica's sums: place → what is told of it
        self._layout, self._pace = Layout(broker, team), Pace()
        self._summed: tuple[list[Tensor], list[bytes]] | None = None  # of all replicas, while they vote
        self._done_at = time.perf_counter()  # when the step before this one was done

    def __enter__(self) -> ElasticReplica:
        self.seat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reducer.close()
        self._duties.resign()
        self.seat.__exit__(kind, error, trace)

    def train(self) -> None:
        """Train until the last step, or until asked to stop; what it has claimed then, others claim.

        Raises Conflict if the run was reset, Diverged if replicas disagree.
        """
        try:
            while self.step < self._team.num_steps:
                self.seat.check_stop()
                try:
                    self._go_on()
                except Moved:
                    self._move()
                except LeaseLost:  # another step is open by now
                    self._drop_work()
            # each that leaves sees that the last step was followed up, in case those before it died
            if self.seat.wait_to_be_first():
                self._duties.follow_up(self.step)
                self._duties.finish(self.step)
        except Stopped:
            with suppress(LeaseLost):  # another replica leads by now, and saves
                if self._meeting is not None and self._leads(self._meeting):
                    self._duties.finish(self.step)

    def _go_on(self) -> None:
        try:
            if self.seat.me is None:
                self._enter()
            elif self._meeting is None:
                self._meet(self.seat.me)
            else:
                self._one_step(self.seat.me, self._meeting)
        except PeerLost:
            self._disconnect()
            self.seat.part()

    # -- coming and going -----------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._drop_work()
        self._duties.resign()
        self.step = self.seat.take(self._generation, self.step, self._duties.resume)
        if self.seat.me is not None:
            self._generation = self.seat.me.generation

    def _move(self) -> None:
        """The epoch is over: go on in the next one, with the gradients of groups that are still this replica's."""
        self._disconnect()
        voted_in = self.seat.me
        standing = self.seat.move()
        if self._summed is not None and self._batch is not None and voted_in is not None:
            mine = (voted_in.generation, self._batch.step, voted_in.epoch)
            if (standing.generation, standing.step, standing.won) == mine:  # committed, by the votes of others
                self._apply()
        self._summed = None
        if self._batch is not None and standing.open != self._batch.step:  # it was closed: it may be opened again
            self._drop_work()

    def _meet(self, me: Membership) -> None:
        """Wait for all replicas, connect to them, and give the newest weights to those that lack them."""
        meeting = self.seat.meet(me)
        current = [rank for rank, step in enumerate(meeting.steps.values()) if step == meeting.step]
        rank = list(meeting.steps).index(me.id)
        if len(meeting.steps) > 1:
            self._reducer = connect(self._team.over, self._broker, me, rank, len(meeting.steps), self.seat.watch)
            self._compute.connect(me, rank, len(meeting.steps))
        crash_point("met", max(0, self.step))
        for other, step in enumerate(meeting.steps.values()):
            if step == meeting.step:
                continue
            if rank == current[0]:
                self._compute.give(self._reducer, other, self.seat.watch)
            elif rank == other:
                self._drop_work()
                self._compute.get(self._reducer, current[0], self.seat.watch)
                self.step = meeting.step
                self._broker.call(self._members.heal, me, self.step)
                crash_point("healed", self.step)
        self._meeting = meeting
        self._pace.met(len(meeting.steps))
        self._duties.met(meeting, me)
        if self._leads(meeting):
            self._duties.follow_up(self.step)  # what its predecessor did not get to

    def _disconnect(self) -> None:
        self._reducer.close()
        self._compute.disconnect()
        self._reducer, self._meeting, self._laid_out = Alone(), None, None

    def _leads(self, meeting: Meeting) -> bool:
        return self.seat.me is not None and next(iter(meeting.steps)) == self.seat.me.id

    # -- one step -------------------------------------------------------------------------------------------------

    def _one_step(self, me: Membership, meeting: Meeting) -> None:
        batch, leads = self._open(me, meeting), self._leads(meeting)
        began = time.perf_counter()
        if leads:
            self._layout.prepare(batch.step)
        with Claims(self._broker, self._team, me, batch, self._held, self._pace) as claims:
            while groups := self._next(me, batch, claims):
                crash_point("claimed", batch.step)
                told = self._compute.accumulate(batch, groups)
                self._held.update(zip([place for place, _ in groups], told, strict=True))
                crash_point("accumulated", batch.step)
                self.seat.reap()
        computed = time.perf_counter()
        crash_point("reducing", batch.step)
        sums, told = self._summed = sum_up(self._reducer, batch, self._compute, self._held, self._pace, self.seat.watch)
        crash_point("reduced", batch.step)
        reduced = time.perf_counter()
        entry, letters = self._compute.entry(batch, self.step, sums, told)
        names = " ".join(sorted(id_.rsplit(":", 1)[0] for id_ in meeting.steps))
        lag = lag_of(batch, self.step, shadow=self._team.shadow)
        entry = structs.replace(entry, replica=names, lag=lag, seconds=reduced - began)
        if leads:
            self._duties.settle()
        mine = len(self._held)
        self._vote(me, entry, letters, digest(sums, told))
        crash_point("committed", batch.step)
        voted = time.perf_counter()
        self._apply()
        crash_point("applied", self.step)
        if leads:
            trained = Trained(
                entry=entry,
                letters=letters,
                told=told,
                groups=mine,
                replicas=len(meeting.steps),
                since=self._done_at,
                wait_s=began - self._done_at,
                reduce_s=reduced - computed,
                vote_s=voted - reduced,
            )
            if self.step < self._team.num_steps:
                self._laid_out = self._layout.lay_out(me)  # for the others to go on, while this one has duties
            self._duties.report(trained)
            self._duties.follow_up(self.step)
        self._done_at = time.perf_counter()

    def _open(self, me: Membership, meeting: Meeting) -> BatchEntry:
        """The batch in work, once there is one. The first replica gets it lent for all."""
        leads, queue, since = self._leads(meeting), self._broker.broker.queue, time.monotonic()
        while self._laid_out is None:
            self.seat.watch()
            standing = self._broker.call(self._members.standing, self._team.policy)
            if standing is not None and standing.open:
                self._laid_out = self._broker.call(queue.batch, standing.open)
                if self._laid_out is None:
                    self._close(me, standing.open, "its batch was taken apart")
            elif leads:
                newest = self._broker.call(queue.newest_group)
                self._laid_out = self._layout.lay_out(me)
                if self._laid_out is None:
                    self._broker.call(queue.wait_for_group, FORM_S, after=newest)
            else:
                pause(since)
        batch, self._laid_out = self._laid_out, None
        if self._batch is None or self._batch.step != batch.step:
            self._drop_work()
            self._batch = batch
        if leads:
            self._duties.opened(batch.step)
        return batch

    def _next(self, me: Membership, batch: BatchEntry, claims: Claims) -> list[tuple[int, Group]]:
        try:
            return claims.next()
        except LookupError as error:
            self.seat.check_epoch()  # evicted meanwhile: others have trained them by now, and a checkpoint has freed them
            self._close(me, batch.step, str(error))

    def _close(self, me: Membership, step: int, why: str) -> NoReturn:
        """The step can't be trained as it is. The first replica sees to that when all have met (see next_batch.py)."""
        self._broker.call(self._members.close, me, step, why=why)
        raise Moved(f"step {step} of policy {me.policy!r} was closed: {why}")

    def _vote(self, me: Membership, entry: LedgerEntry, letters: Sequence[DeadEntry], digest: str) -> None:
        """Returns when all have voted for the same sums: the step is committed."""
        vote, since = self._members.vote, time.monotonic()
        try:
            while not self._broker.call(vote, me, entry.step, digest, entry, untrainable=letters):
                crash_point("voted", entry.step)
                self.seat.watch()
                pause(since)
        except LeaseLost as error:  # its batch was taken apart, or is lent to others by now
            self._close(me, entry.step, str(error))

    def _apply(self) -> None:
        assert self._batch is not None
        assert self._summed is not None
        self._compute.apply(self._batch, *self._summed)
        self.step = self._batch.step
        self._batch, self._held, self._summed = None, {}, None

    def _drop_work(self) -> None:
        self._batch, self._laid_out, self._held, self._summed = None, None, {}, None
        self._compute.clear()

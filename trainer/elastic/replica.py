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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

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
from lachesis.trainer.elastic.config import ElasticConfig, StepRecord
from lachesis.trainer.elastic.membership import GroupMembership, Stopped, pause
from lachesis.trainer.elastic.next_batch import BatchOpener, close_step
from lachesis.trainer.elastic.step_sums import digest, sum_over_replicas

if TYPE_CHECKING:  # it needs verl
    from lachesis.trainer.elastic.leader import Leader


class ElasticReplica:
    """`with ElasticReplica(…) as replica: training_loop(replica)`.

    Its calls raise Conflict if the run was reset, Diverged if replicas disagree. What it has claimed when it is asked to
    stop, others claim.
    """

    def __init__(
        self,
        broker: BlockingBroker,
        config: ElasticConfig,
        name: str,
        accumulator: GradientAccumulator,
        make_leader: Callable[[GroupMembership], Leader],
        stopping: Callable[[], bool],
    ) -> None:
        self._broker, self._members = broker, broker.broker.members
        self._config, self._accumulator = config, accumulator
        self.membership = GroupMembership(broker, config, name, stopping)
        self._leader = make_leader(self.membership)
        self.weights_step = NO_WEIGHTS
        self._generation = 0  # that they belong to
        self._rendezvous: Rendezvous | None = None
        self._reducer: Reducer = Alone()
        self._batch: BatchEntry | None = None  # the step in work
        self._opened: BatchEntry | None = None  # the one after it, by this replica
        self._held: dict[int, bytes] = {}  # its groups in this replica's sums: place → what is told of it
        self._opener, self._claim_policy = BatchOpener(broker, config), ClaimPolicy()
        self._summed: tuple[list[Tensor], list[bytes]] | None = None  # of all replicas, while they vote
        self._stopped = False

    def __enter__(self) -> ElasticReplica:
        self.membership.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reducer.close()
        self._leader.resign()
        self.membership.__exit__(kind, error, trace)

    # -- the calls of the loop ------------------------------------------------------------------------------------

    def next_batch(self) -> StepRecord | None:
        """Joins the others first, and gets the weights, where that is not done."""
        while self.weights_step < self._config.num_steps and not self._stopped:
            self.membership.check_stop()
            if self.membership.me is None:
                self._enter()
            elif self._rendezvous is None:
                self._meet(self.membership.me)
            else:
                me, rendezvous = self.membership.me, self._rendezvous
                return StepRecord(self._open(me), me, rendezvous, began=time.perf_counter())
        return None

    def forward_backward(self, work: StepRecord) -> None:
        """Of groups that this replica claims, until all are claimed; those that it has from an earlier try count."""
        batch = work.batch
        if self._leads:
            self._opener.prepare(batch.step)
        with Claims(self._broker, self._config, work.me, batch, self._held, self._claim_policy) as claims:
            while groups := self._next(work.me, batch, claims):
                failpoint("claimed", batch.step)
                told = self._accumulator.accumulate(batch, groups)
                self._held.update(zip([place for place, _ in groups], told, strict=True))
                failpoint("accumulated", batch.step)
                self.membership.evict_silent()
        work.computed = time.perf_counter()

    def step(self, work: StepRecord) -> LedgerEntry:
        """Sums over the replicas. The weights stay until the step is committed."""
        failpoint("reducing", work.batch.step)
        self._summed = sum_over_replicas(
            self._reducer, work.batch, self._accumulator, self._held, self._claim_policy, self.membership.watch
        )
        failpoint("reduced", work.batch.step)
        work.reduced = time.perf_counter()
        sums, work.told = self._summed
        work.digest = digest(sums, work.told)
        entry, work.letters = self._accumulator.entry(work.batch, self.weights_step, sums, work.told)
        names = " ".join(sorted(id_.rsplit(":", 1)[0] for id_ in work.rendezvous.steps))
        lag = lag_of(work.batch, self.weights_step, shadow=self._config.shadow)
        return structs.replace(entry, replica=names, lag=lag, seconds=work.reduced - work.began)

    def commit(self, work: StepRecord, entry: LedgerEntry) -> None:
        """Votes; when the last vote has committed the step, applies its sums.

        Not before: where a vote fails because a replica came or went, all still have the weights that the step starts
        from, and the gradients of their groups, and sum again. One that does not hear of the last vote applies them later (`_move`).
        """
        if self._leads:
            self._leader.settle()
        work.own_groups = len(self._held)
        self._vote(work.me, entry, work.letters, work.digest)
        failpoint("committed", work.batch.step)
        work.voted = time.perf_counter()
        self._apply()
        failpoint("applied", self.weights_step)
        if self._leads:
            if self.weights_step < self._config.num_steps:
                self._opened = self._opener.open_next(work.me)  # for the others to go on meanwhile
            self._leader.collect(work, entry)

    def publish(self) -> None:
        if self._leads:
            self._leader.publish(self.weights_step)

    def save(self) -> None:
        if self._leads:
            self._leader.save(self.weights_step)

    def report(self, work: StepRecord, entry: LedgerEntry, seconds: dict[str, float]) -> None:
        if self._leads:
            self._leader.report(work, entry, seconds)

    @contextmanager
    def recovery(self) -> Iterator[None]:
        """Replicas came or went, or the step in work is another: it goes on with those that there are."""
        try:
            try:
                yield
            except PeerLost:
                self._disconnect()
                self.membership.leave()
        except Moved:
            self._move()
        except LeaseLost:  # another step is open by now
            self._drop_work()
        except Stopped:
            self._stopped = True

    def finish(self) -> None:
        """Each that leaves after the last step sees that it was published and saved, in case those before it died."""
        if not self._stopped:
            try:
                if self.membership.wait_to_lead():
                    self._leader.follow_up(self.weights_step)
                    self._leader.finish(self.weights_step)
                return
            except Stopped:
                pass
        with suppress(LeaseLost):  # another replica leads by now, and saves
            if self._leads:
                self._leader.finish(self.weights_step)

    # -- coming and going -----------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._drop_work()
        self._leader.resign()
        self.weights_step = self.membership.join(self._generation, self.weights_step, self._leader.resume)
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
        failpoint("met", max(0, self.weights_step))
        for other, step in enumerate(rendezvous.steps.values()):
            if step == rendezvous.step:
                continue
            if rank == current[0]:
                self._accumulator.send_state(self._reducer, other, self.membership.watch)
            elif rank == other:
                self._drop_work()
                self._accumulator.receive_state(self._reducer, current[0], self.membership.watch)
                self.weights_step = rendezvous.step
                self._broker.call(self._members.mark_current, me, self.weights_step)
                failpoint("healed", self.weights_step)
        self._rendezvous = rendezvous
        self._claim_policy.met(len(rendezvous.steps))
        self._leader.met(rendezvous, me)
        if self._leads:
            self._leader.follow_up(self.weights_step)  # what its predecessor did not get to

    def _disconnect(self) -> None:
        self._reducer.close()
        self._accumulator.disconnect()
        self._reducer, self._rendezvous, self._opened = Alone(), None, None

    @property
    def _leads(self) -> bool:
        """Whether this replica is the first of those that are connected."""
        me, rendezvous = self.membership.me, self._rendezvous
        return me is not None and rendezvous is not None and next(iter(rendezvous.steps)) == me.id

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _open(self, me: Membership) -> BatchEntry:
        batch = self._opened or self._opener.wait(me, leads=self._leads, watch=self.membership.watch)
        self._opened = None
        if self._batch is None or self._batch.step != batch.step:
            self._drop_work()
            self._batch = batch
        if self._leads:
            self._leader.opened(batch.step)
        return batch

    def _next(self, me: Membership, batch: BatchEntry, claims: Claims) -> list[tuple[int, Group]]:
        try:
            return claims.next()
        except LookupError as error:
            self.membership.check_epoch()  # evicted meanwhile: others have trained them by now, and a checkpoint has freed them
            close_step(self._broker, me, batch.step, str(error))

    def _vote(self, me: Membership, entry: LedgerEntry, letters: Sequence[DeadEntry], digest: str) -> None:
        """Returns when all have voted for the same sums: the step is committed."""
        vote, since = self._members.vote, time.monotonic()
        try:
            while not self._broker.call(vote, me, entry.step, digest, entry, untrainable=letters):
                failpoint("voted", entry.step)
                self.membership.watch()
                pause(since)
        except LeaseLost as error:  # its batch was taken apart, or is lent to others by now
            close_step(self._broker, me, entry.step, str(error))

    def _apply(self) -> None:
        assert self._batch is not None
        assert self._summed is not None
        self._accumulator.apply(self._batch, *self._summed)
        self.weights_step = self._batch.step
        self._batch, self._held, self._summed = None, {}, None

    def _drop_work(self) -> None:
        self._batch, self._opened, self._held, self._summed = None, None, {}, None
        self._accumulator.clear()

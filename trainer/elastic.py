"""One of several replicas that train a policy together: one optimizer trajectory, however many there are and who dies.

A step, for each replica: claim groups and accumulate their gradients until all are claimed; sum over the replicas; vote;
when the last vote has committed the step, apply the sum. Whoever dies before its vote leaves groups behind that the
others claim; nobody else's gradients are lost, as what is summed is a copy. Whoever dies after the commit is not missed.
Between steps all replicas hold the same weights, bit for bit, so a new one gets them from any other.

Protocol and proofs by test: broker/members.py. What is computed, and by what, only `Compute` knows.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lachesis.broker import BlockingBroker, Conflict, LachesisError, LeaseLost
from lachesis.broker.crash import crash_point
from lachesis.broker.errors import Moved
from lachesis.broker.heartbeat import Heartbeat
from lachesis.broker.members import CONSUMER, NO_WEIGHTS, Meeting, new_id
from lachesis.broker.records import BatchEntry, Group, LedgerEntry, Membership
from lachesis.trainer.reducer import Alone, GlooReducer, PeerLost, Reducer
from lachesis.trainer.tenure import Tenure

BEAT_S = 0.25
SUSPECT_S = 0.75  # a replica whose connection broke is gone if its last beat is older than this
LOOK_S = 0.05  # between two looks at whether the epoch is still the same, while something is waited for
REAP_S = 0.25  # between two looks for silent replicas
POLL_S = 0.002  # between two questions to Redis whose answer others are about to change
FORM_S = 0.25  # the leader waits so long for rollouts before it looks around


class Stopped(LachesisError):
    """Asked to stop, while waiting for other replicas."""


class Compute(Protocol):
    """What one replica computes. Sums are contiguous tensors in host memory, alike in shape and dtype on all replicas."""

    def accumulate(self, batch: BatchEntry, claimed: Sequence[tuple[int, Group]]) -> None:
        """Add groups of the batch, each with its place in it, to the sums."""

    def sums(self) -> list[Tensor]:
        """A copy of the sums so far; zeros before the first group."""

    def clear(self) -> None:
        """Forget the sums."""

    def apply(self, batch: BatchEntry, sums: Sequence[Tensor]) -> None:
        """Make one optimizer step of all replicas' sums; its own are cleared."""

    def entry(self, batch: BatchEntry, sums: Sequence[Tensor]) -> LedgerEntry:
        """What the ledger says of the step; its `replica` and `seconds` are filled in by the caller."""

    def state(self) -> list[Tensor]:
        """All that decides what later steps do: weights, optimizer, schedule, random numbers."""

    def load(self, state: Sequence[Tensor]) -> None:
        """Take over another replica's state. The tensors passed are filled anew, and may be kept."""


class Duties(Protocol):
    """What only one replica does; each may be repeated by another one that took over in the middle of it."""

    def resume(self, tenure: Tenure) -> int:
        """Bring the weights in memory from the newest checkpoint to the end of the ledger; the step it ends at."""

    def follow_up(self, step: int) -> None:
        """Publish and save what is due with step `step`, which is committed and in memory; all that is still missing."""


@dataclass(frozen=True)
class Team:
    """What all replicas of a policy agree on."""

    policy: str
    batch_size: int
    num_steps: int
    silent_s: float  # a replica without a heartbeat for so long is taken out
    hold_s: float  # after such a silence of all of them a checkpoint is gone back to
    max_deliveries: int = 10
    chunk: int = 1  # groups claimed at a time; a slow replica delays a step by at most so many


class ElasticReplica:
    """`with ElasticReplica(…) as replica: replica.train(stopping)`."""

    def __init__(self, broker: BlockingBroker, team: Team, name: str, compute: Compute, duties: Duties) -> None:
        self._broker, self._members = broker, broker.broker.members
        self._team, self._name, self._compute, self._duties = team, name, compute, duties
        self._heartbeat = Heartbeat(
            broker.broker.url, broker.broker.keys.run, team.policy, every_s=BEAT_S, hold_s=team.hold_s
        )
        self.step = NO_WEIGHTS  # of the weights in memory
        self._generation = 0  # that they belong to
        self._me: Membership | None = None
        self._meeting: Meeting | None = None
        self._reducer: Reducer = Alone()
        self._batch: BatchEntry | None = None  # the step in work
        self._held: dict[int, str] = {}  # its groups in this replica's sums: place → gid
        self._reduced: list[Tensor] | None = None  # the sums of all replicas, while they vote
        self._looked_at = self._reaped_at = 0.0
        self._stopping: Callable[[], bool] = lambda: False

    def __enter__(self) -> ElasticReplica:
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._reducer.close()
        self._heartbeat.__exit__(None, None, None)  # which takes this replica out

    def train(self, stopping: Callable[[], bool]) -> None:
        """Train until the last step, or until `stopping`; what it has claimed then, others claim.

        Raises Conflict if the run was reset, Diverged if replicas disagree.
        """
        self._stopping = stopping
        try:
            while self.step < self._team.num_steps:
                self._check_stop()
                try:
                    self._go_on()
                except Moved:
                    self._move()
                except LeaseLost:  # the batch was given up, or is lent to others by now
                    self._drop_work()
            self._finish()
        except Stopped:
            return

    def _go_on(self) -> None:
        try:
            if self._me is None:
                self._enter()
            elif self._meeting is None:
                self._meet(self._me)
            else:
                self._one_step(self._me, self._meeting)
        except PeerLost:
            self._part()

    def _finish(self) -> None:
        """The last step is committed. Each that leaves sees that it was followed up, in case those before it died."""
        while self._me is not None:
            self._check_stop()
            self._reap()
            alive = [member.id for member in self._broker.call(self._members.members, self._team.policy)]
            if self._me.id not in alive or alive[0] == self._me.id:
                break
            time.sleep(LOOK_S)
        if self._me is not None and self._me.id == alive[0]:
            self._duties.follow_up(self.step)

    # -- coming and going -----------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Join the replicas there are; found them where there are none."""
        self._drop_work()
        id_, policy = new_id(self._name), self._team.policy
        join = self._members.join
        me = self._broker.call(join, policy, id_, generation=self._generation, step=self.step)
        if me is None:
            me = self._found(id_)
        if me is not None:
            self._heartbeat.beat_for(id_)
            self._me, self._generation = me, me.generation
            crash_point("joined", max(0, self.step))

    def _found(self, id_: str) -> Membership | None:
        """None if others did."""
        policy, hold_s = self._team.policy, self._team.hold_s
        with Tenure(self._broker, policy, ttl_s=hold_s) as tenure:
            if not tenure.wait(unless=self._others_live, on_standby=lambda: None):
                return None
            self.step = self._duties.resume(tenure)
            tenure.check()
            found = self._members.found
            return self._broker.call(found, policy, id_, token=tenure.token, step=self.step, hold_s=hold_s)

    def _others_live(self) -> bool:
        self._check_stop()
        standing = self._broker.call(self._members.standing, self._team.policy)
        return standing is not None and self._broker.call(
            self._members.hold_lock, self._team.policy, standing.generation
        )

    def _move(self) -> None:
        """The epoch is over: go on in the next one, with the gradients of groups that are still this replica's."""
        self._reducer.close()
        self._reducer, self._meeting = Alone(), None
        standing = self._broker.call(self._members.standing, self._team.policy)
        if standing is None:
            raise Conflict(
                f"run {self._broker.broker.keys.run!r} was reset while policy {self._team.policy!r} was trained"
            )
        assert self._me is not None
        if self._reduced is not None:
            self._apply_if_committed()
        self._reduced = None
        alive = [member.id for member in self._broker.call(self._members.members, self._team.policy)]
        if standing.generation == self._generation and self._me.id in alive:
            self._me = Membership(self._team.policy, self._me.id, standing.generation, standing.epoch)
        else:
            self._me = None

    def _part(self) -> None:
        """A connection broke. Take out whose heartbeat stopped too; where none did, leave, so that all connect anew."""
        self._reducer.close()
        self._reducer, self._meeting = Alone(), None
        assert self._me is not None
        until = time.monotonic() + self._team.silent_s
        others = [m.id for m in self._broker.call(self._members.members, self._team.policy) if m.id != self._me.id]
        while time.monotonic() < until:
            self._evict(dict.fromkeys(others, SUSPECT_S))
            self._check_epoch()
            time.sleep(LOOK_S)
        self._evict({self._me.id: 0})

    def _meet(self, me: Membership) -> None:
        """Wait for all replicas, connect to them, and give the newest weights to those that lack them."""
        while (meeting := self._broker.call(self._members.meet, me)) is None:
            self._watch()
            time.sleep(POLL_S)
        current = [rank for rank, step in enumerate(meeting.steps.values()) if step == meeting.step]
        while not current:  # nobody left has the newest weights: after hold_s one starts from a checkpoint
            self._watch()
            if not self._broker.call(self._members.is_held, self._team.policy):
                self._evict({me.id: 0})
            time.sleep(LOOK_S)
        rank = list(meeting.steps).index(me.id)
        if len(meeting.steps) > 1:
            self._reducer = GlooReducer(self._broker, me, rank, len(meeting.steps), self._watch)
        crash_point("met", max(0, self.step))
        for other, step in enumerate(meeting.steps.values()):
            if step == meeting.step:
                continue
            if rank == current[0]:
                self._reducer.send(self._compute.state(), other, self._watch)
            elif rank == other:
                self._drop_work()
                state = self._compute.state()
                self._reducer.receive(state, current[0], self._watch)
                self._compute.load(state)
                self.step = meeting.step
                self._broker.call(self._members.heal, me, self.step)
                crash_point("healed", self.step)
        self._meeting = meeting
        if rank == 0:
            self._duties.follow_up(self.step)  # what its predecessor did not get to

    # -- one step -------------------------------------------------------------------------------------------------

    def _one_step(self, me: Membership, meeting: Meeting) -> None:
        batch = self._open(me, meeting)
        began = time.perf_counter()
        while claimed := self._claim(me, batch):
            crash_point("claimed", batch.step)
            groups = self._broker.call(self._broker.broker.queue.fetch, [gid for _, gid in claimed])
            self._compute.accumulate(batch, [(place, group) for (place, _), group in zip(claimed, groups, strict=True)])
            self._held.update(claimed)
            crash_point("accumulated", batch.step)
            self._reap()
        sums = [*self._compute.sums(), self._tally()]
        crash_point("reducing", batch.step)
        self._reducer.sum(sums, self._watch)
        crash_point("reduced", batch.step)
        self._check_tally(sums.pop(), batch)
        self._reduced = sums
        digest = 0
        for tensor in sums:
            digest = zlib.crc32(tensor.view(torch.uint8).numpy().data, digest)
        names = " ".join(sorted(id_.rsplit(":", 1)[0] for id_ in meeting.steps))
        entry = self._compute.entry(batch, sums)
        entry = LedgerEntry(
            **{f: getattr(entry, f) for f in entry.__struct_fields__}
            | {"replica": names, "seconds": time.perf_counter() - began}
        )
        while not self._broker.call(self._members.vote, me, batch.step, f"{digest:08x}", entry):
            crash_point("voted", batch.step)
            self._watch()
            time.sleep(POLL_S)
        crash_point("committed", batch.step)
        self._apply()
        crash_point("applied", self.step)
        if next(iter(meeting.steps)) == me.id:
            self._duties.follow_up(self.step)

    def _open(self, me: Membership, meeting: Meeting) -> BatchEntry:
        """The batch in work, once there is one. The first replica gets it lent for all."""
        leads, queue = next(iter(meeting.steps)) == me.id, self._broker.broker.queue
        while True:
            self._watch()
            standing = self._broker.call(self._members.standing, me.policy)
            if standing is not None and standing.open:
                if self._batch is None or self._batch.step != standing.open:
                    self._drop_work()
                    self._batch = self._broker.call(queue.batch, standing.open)
                if self._batch is not None:
                    return self._batch
            elif leads:
                newest = self._broker.call(queue.newest_group)
                lease = self._broker.call(
                    queue.lease_or_form,
                    me.policy,
                    CONSUMER,
                    self._team.batch_size,
                    lapse_s=0,
                    max_deliveries=self._team.max_deliveries,
                )
                if lease is not None:
                    crash_point("leased", lease.batch.step)
                    self._broker.call(self._members.open, me, lease.batch.step)
                    continue
                self._broker.call(queue.wait_for_group, FORM_S, after=newest)
            else:
                time.sleep(POLL_S)

    def _claim(self, me: Membership, batch: BatchEntry) -> list[tuple[int, str]]:
        """More groups for this replica; none once replicas have them all."""
        while True:
            claimed = self._broker.call(
                self._members.claim, me, batch.step, count=self._team.chunk, held=len(self._held)
            )
            if claimed is None:
                return []
            if new := [(place, gid) for place, gid in claimed.groups if place not in self._held]:
                return new

    def _tally(self) -> Tensor:
        """What shows, summed over the replicas, that each group is in the sums once: how many, and two sums of places."""
        places = torch.tensor(sorted(self._held), dtype=torch.int64)
        return torch.stack([torch.tensor(len(places)), places.sum(), (places**2).sum()])

    @staticmethod
    def _check_tally(tally: Tensor, batch: BatchEntry) -> None:
        places = torch.arange(len(batch.gids))
        expected = torch.stack([torch.tensor(len(places)), places.sum(), (places**2).sum()])
        if not tally.equal(expected):
            raise Conflict(
                f"step {batch.step}: its groups are not each in the replicas' sums once "
                f"(tally {tally.tolist()}, must be {expected.tolist()}); nothing was committed"
            )

    def _apply(self) -> None:
        assert self._batch is not None
        assert self._reduced is not None
        self._compute.apply(self._batch, self._reduced)
        self.step = self._batch.step
        self._batch, self._held, self._reduced = None, {}, None

    def _apply_if_committed(self) -> None:
        """After it lost touch while it waited for the votes of others."""
        standing = self._broker.call(self._members.standing, self._team.policy)
        if standing is None or self._batch is None or self._me is None:
            return
        if (standing.generation, standing.step, standing.won) == (
            self._me.generation, self._batch.step, self._me.epoch
        ):  # fmt: skip
            self._apply()

    def _drop_work(self) -> None:
        self._batch, self._held, self._reduced = None, {}, None
        self._compute.clear()

    # -- while it waits -------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Raises Moved if the epoch is over, and Stopped. May be called often."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        self._check_stop()
        self._reap()
        self._check_epoch()

    def _check_epoch(self) -> None:
        standing = self._broker.call(self._members.standing, self._team.policy)
        assert self._me is not None
        if standing is None or (standing.generation, standing.epoch) != (self._me.generation, self._me.epoch):
            raise Moved(f"epoch {self._me.epoch} of policy {self._team.policy!r} is over")

    def _reap(self) -> None:
        """Take out who is silent for too long."""
        if time.monotonic() - self._reaped_at >= REAP_S:
            self._reaped_at = time.monotonic()
            self._heartbeat.check()
            self._evict({})

    def _evict(self, limits: dict[str, float]) -> None:
        self._broker.call(self._members.evict, self._team.policy, silent_s=self._team.silent_s, limits=limits)

    def _check_stop(self) -> None:
        if self._stopping():
            raise Stopped("asked to stop")

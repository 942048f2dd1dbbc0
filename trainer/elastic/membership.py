"""A replica's place among those that train its policy: joining, being taken out, and finding out that others were."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

from lachesis.broker import BlockingBroker, Conflict, LachesisError, LeaseLost
from lachesis.broker.errors import Moved
from lachesis.broker.failpoints import crash_point
from lachesis.broker.records.steps import Membership
from lachesis.broker.replicas.members import Meeting, Standing, new_id
from lachesis.trainer.elastic.config import Team
from lachesis.trainer.elastic.heartbeat import Heartbeat
from lachesis.trainer.writer_lock import Tenure

BEAT_S = 0.25
SUSPECT_S = 0.75  # a replica whose connection broke is gone if its last beat is older than this
LOOK_S = 0.05  # between two looks at whether the epoch is still the same, while something is waited for
REAP_S = 0.25  # between two looks for silent replicas
POLL_S = 0.001  # between two questions to Redis whose answer others are about to change; later ones are further apart


def pause(since: float) -> None:
    """Between two questions to Redis, the first of which was asked at `since`, of time.monotonic()."""
    time.sleep(min(LOOK_S, max(POLL_S, (time.monotonic() - since) / 8)))


class Stopped(LachesisError):
    """Asked to stop, while waiting for other replicas."""


class Seat:
    """`with Seat(…) as seat:`; from the end of the block on the replica is no member."""

    def __init__(self, broker: BlockingBroker, team: Team, name: str, stopping: Callable[[], bool]) -> None:
        self._broker, self._members = broker, broker.broker.members
        self._team, self._name, self._stopping = team, name, stopping
        self._heartbeat = Heartbeat(
            broker.broker.url, broker.broker.keys.run, team.policy, every_s=BEAT_S, hold_s=team.hold_s
        )
        self.me: Membership | None = None
        self._looked_at = self._reaped_at = 0.0
        self._reaping: Future[int] | None = None

    def __enter__(self) -> Seat:
        self._heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.__exit__(kind, error, trace)  # which takes this replica out

    # -- coming ---------------------------------------------------------------------------------------------------

    def take(self, generation: int, step: int, resume: Callable[[Tenure], int]) -> int:
        """Join the replicas there are, with weights of that generation and step; found them where there are none.

        Returns the step of the weights in memory then: `resume` has brought them to the ledger's end where it founded.
        """
        id_, policy = new_id(self._name), self._team.policy
        self.me = self._broker.call(self._members.join, policy, id_, generation=generation, step=step)
        if self.me is None:
            hold_s = self._team.hold_s
            with Tenure(self._broker, policy, ttl_s=hold_s) as tenure:
                if not tenure.wait(unless=self._others_live, on_standby=lambda: None):
                    return step
                step = resume(tenure)
                tenure.check()
                found = self._members.found
                self.me = self._broker.call(found, policy, id_, token=tenure.token, step=step, hold_s=hold_s)
        if self.me is not None:
            self._heartbeat.beat_for(id_)
            crash_point("joined", max(0, step))
        return step

    def meet(self, me: Membership) -> Meeting:
        """Wait until all replicas of the epoch are here, and one of them has the newest weights."""
        since = time.monotonic()
        while (meeting := self._broker.call(self._members.meet, me)) is None:
            self.watch()
            pause(since)
        while meeting.step not in meeting.steps.values():  # after hold_s one starts from a checkpoint
            self.watch()
            if not self._broker.call(self._members.is_held, self._team.policy):
                self._evict({me.id: 0})
            time.sleep(LOOK_S)
        return meeting

    # -- going ----------------------------------------------------------------------------------------------------

    def move(self) -> Standing:
        """The epoch is over: be a member of the next one, or none (`me` is None) if this replica was taken out.

        Raises Conflict if the run was reset.
        """
        standing = self._broker.call(self._members.standing, self._team.policy)
        if standing is None:
            raise Conflict(
                f"run {self._broker.broker.keys.run!r} was reset while policy {self._team.policy!r} was trained"
            )
        assert self.me is not None
        if self._ousted(self.me):
            self._evict({self.me.id: 0})
        stays = standing.generation == self.me.generation and self.me.id in self.alive()
        self.me = Membership(self._team.policy, self.me.id, standing.generation, standing.epoch) if stays else None
        return standing

    def part(self) -> None:
        """A connection broke. Take out whose heartbeat stopped too; where none did, leave, so that all connect anew."""
        assert self.me is not None
        until = time.monotonic() + self._team.silent_s
        others = [id_ for id_ in self.alive() if id_ != self.me.id]
        while time.monotonic() < until:
            self._evict(dict.fromkeys(others, SUSPECT_S))
            self.check_epoch()
            time.sleep(LOOK_S)
        self._evict({self.me.id: 0})

    def wait_to_be_first(self) -> bool:
        """When the others have gone, or died; False if this replica was taken out meanwhile."""
        while self.me is not None:
            self.check_stop()
            self.reap()
            alive = self.alive()
            if self.me.id not in alive:
                return False
            if alive[0] == self.me.id:
                return True
            time.sleep(LOOK_S)
        return False

    # -- looking --------------------------------------------------------------------------------------------------

    def alive(self) -> list[str]:
        """Ids of all replicas, in the order in which they joined; the first one leads."""
        return [member.id for member in self._broker.call(self._members.members, self._team.policy)]

    def check(self) -> None:
        """Raise LeaseLost unless this replica leads. Any thread may ask."""
        me = self.me
        if me is None or self.alive()[:1] != [me.id]:
            raise LeaseLost(f"another replica publishes policy {self._team.policy!r} now")

    def watch(self) -> None:
        """Raises Moved if the epoch is over, and Stopped. May be called often."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        self.check_stop()
        self.reap()
        self.check_epoch()

    def reap(self) -> None:
        """Have those taken out that are silent for too long; returns at once."""
        if time.monotonic() - self._reaped_at >= REAP_S and (self._reaping is None or self._reaping.done()):
            if self._reaping is not None:
                self._reaping.result()
            self._reaped_at = time.monotonic()
            self._heartbeat.check()
            self._reaping = self._broker.start(self._members.evict, self._team.policy, silent_s=self._team.silent_s)

    def _others_live(self) -> bool:
        self.check_stop()
        standing = self._broker.call(self._members.standing, self._team.policy)
        return standing is not None and self._broker.call(
            self._members.hold_lock, self._team.policy, standing.generation
        )

    def check_epoch(self) -> None:
        """Raise Moved if the epoch is over."""
        standing = self._broker.call(self._members.standing, self._team.policy)
        assert self.me is not None
        if standing is None or (standing.generation, standing.epoch) != (self.me.generation, self.me.epoch):
            raise Moved(f"epoch {self.me.epoch} of policy {self._team.policy!r} is over")
        if self._ousted(self.me):  # all fell silent for too long: what is committed now, others commit
            raise Moved(f"another trainer has taken policy {self._team.policy!r} over")

    def _ousted(self, me: Membership) -> bool:
        return self._broker.call(self._members.is_ousted, self._team.policy, me.generation)

    def _evict(self, limits: dict[str, float]) -> None:
        self._broker.call(self._members.evict, self._team.policy, silent_s=self._team.silent_s, limits=limits)

    def check_stop(self) -> None:
        if self._stopping():
            raise Stopped("asked to stop")

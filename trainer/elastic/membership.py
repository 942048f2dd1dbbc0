"""A replica's place among those that train its policy: joining, being taken out, and finding out that others were."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

from lachesis.broker import BlockingBroker, Conflict, LachesisError, LeaseLost
from lachesis.broker.errors import Moved
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.steps import Membership
from lachesis.broker.replicas.members import EpochState, Rendezvous, new_id
from lachesis.trainer.elastic.config import ElasticConfig
from lachesis.trainer.elastic.heartbeat import Heartbeat
from lachesis.trainer.writer_lock import WriterLease

BEAT_S = 0.25
SUSPECT_S = 0.75  # a replica whose connection broke is gone if its last beat is older than this
EPOCH_POLL_S = 0.05  # between two looks at whether the epoch is still the same, while something is waited for
REAP_S = 0.25  # between two looks for silent replicas
REPLY_POLL_S = (
    0.001  # between two questions to Redis whose answer others are about to change; later ones are further apart
)


def pause(since: float) -> None:
    """Between two questions to Redis, the first of which was asked at `since`, of time.monotonic()."""
    time.sleep(min(EPOCH_POLL_S, max(REPLY_POLL_S, (time.monotonic() - since) / 8)))


class Stopped(LachesisError):
    """Asked to stop, while waiting for other replicas."""


class GroupMembership:
    """`with GroupMembership(…) as seat:`; from the end of the block on the replica is no member."""

    def __init__(self, broker: BlockingBroker, config: ElasticConfig, name: str, stopping: Callable[[], bool]) -> None:
        self._broker, self._members = broker, broker.broker.members
        self._config, self._name, self._stopping = config, name, stopping
        self._heartbeat = Heartbeat(
            broker.broker.url, broker.broker.keys.run, config.policy, every_s=BEAT_S, hold_s=config.hold_s
        )
        self.me: Membership | None = None
        self._looked_at = self._reaped_at = 0.0
        self._reaping: Future[int] | None = None

    def __enter__(self) -> GroupMembership:
        self._heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.__exit__(kind, error, trace)  # which takes this replica out

    # -- coming ---------------------------------------------------------------------------------------------------

    def join(self, generation: int, step: int, resume: Callable[[WriterLease], int]) -> int:
        """Join the replicas there are, with weights of that generation and step; found them where there are none.

        Returns the step of the weights in memory then: `resume` has brought them to the ledger's end where it founded.
        """
        id_, policy = new_id(self._name), self._config.policy
        self.me = self._broker.call(self._members.join, policy, id_, generation=generation, step=step)
        if self.me is None:
            hold_s = self._config.hold_s
            with WriterLease(self._broker, policy, ttl_s=hold_s) as writer_lease:
                if not writer_lease.wait(unless=self._others_live, on_standby=lambda: None):
                    return step
                step = resume(writer_lease)
                writer_lease.check()
                found = self._members.start_generation
                self.me = self._broker.call(found, policy, id_, token=writer_lease.token, step=step, hold_s=hold_s)
        if self.me is not None:
            self._heartbeat.beat_for(id_)
            failpoint("joined", max(0, step))
        return step

    def rendezvous(self, me: Membership) -> Rendezvous:
        """Wait until all replicas of the epoch are here, and one of them has the newest weights."""
        since = time.monotonic()
        while (rendezvous := self._broker.call(self._members.rendezvous, me)) is None:
            self.watch()
            pause(since)
        while rendezvous.step not in rendezvous.steps.values():  # after hold_s one starts from a checkpoint
            self.watch()
            if not self._broker.call(self._members.is_held, self._config.policy):
                self._evict({me.id: 0})
            time.sleep(EPOCH_POLL_S)
        return rendezvous

    # -- going ----------------------------------------------------------------------------------------------------

    def enter_next_epoch(self) -> EpochState:
        """The epoch is over: be a member of the next one, or none (`me` is None) if this replica was taken out.

        Raises Conflict if the run was reset.
        """
        epoch_state = self._broker.call(self._members.epoch_state, self._config.policy)
        if epoch_state is None:
            raise Conflict(
                f"run {self._broker.broker.keys.run!r} was reset while policy {self._config.policy!r} was trained"
            )
        assert self.me is not None
        if self._ousted(self.me):
            self._evict({self.me.id: 0})
        stays = epoch_state.generation == self.me.generation and self.me.id in self.living()
        self.me = (
            Membership(self._config.policy, self.me.id, epoch_state.generation, epoch_state.epoch) if stays else None
        )
        return epoch_state

    def leave(self) -> None:
        """A connection broke. Take out whose heartbeat stopped too; where none did, leave, so that all connect anew."""
        assert self.me is not None
        until = time.monotonic() + self._config.silent_s
        others = [id_ for id_ in self.living() if id_ != self.me.id]
        while time.monotonic() < until:
            self._evict(dict.fromkeys(others, SUSPECT_S))
            self.check_epoch()
            time.sleep(EPOCH_POLL_S)
        self._evict({self.me.id: 0})

    def wait_to_lead(self) -> bool:
        """When the others have gone, or died; False if this replica was taken out meanwhile."""
        while self.me is not None:
            self.check_stop()
            self.evict_silent()
            alive = self.living()
            if self.me.id not in alive:
                return False
            if alive[0] == self.me.id:
                return True
            time.sleep(EPOCH_POLL_S)
        return False

    # -- looking --------------------------------------------------------------------------------------------------

    def living(self) -> list[str]:
        """Ids of all replicas, in the order in which they joined; the first one leads."""
        return [member.id for member in self._broker.call(self._members.members, self._config.policy)]

    def check(self) -> None:
        """Raise LeaseLost unless this replica leads. Any thread may ask."""
        me = self.me
        if me is None or self.living()[:1] != [me.id]:
            raise LeaseLost(f"another replica publishes policy {self._config.policy!r} now")

    def watch(self) -> None:
        """Raises Moved if the epoch is over, and Stopped. May be called often."""
        if time.monotonic() - self._looked_at < EPOCH_POLL_S:
            return
        self._looked_at = time.monotonic()
        self.check_stop()
        self.evict_silent()
        self.check_epoch()

    def evict_silent(self) -> None:
        """Have those taken out that are silent for too long; returns at once."""
        if time.monotonic() - self._reaped_at >= REAP_S and (self._reaping is None or self._reaping.done()):
            if self._reaping is not None:
                self._reaping.result()
            self._reaped_at = time.monotonic()
            self._heartbeat.check()
            self._reaping = self._broker.start(self._members.evict, self._config.policy, silent_s=self._config.silent_s)

    def _others_live(self) -> bool:
        self.check_stop()
        epoch_state = self._broker.call(self._members.epoch_state, self._config.policy)
        return epoch_state is not None and self._broker.call(
            self._members.hold_writer_lock, self._config.policy, epoch_state.generation
        )

    def check_epoch(self) -> None:
        """Raise Moved if the epoch is over."""
        epoch_state = self._broker.call(self._members.epoch_state, self._config.policy)
        assert self.me is not None
        if epoch_state is None or (epoch_state.generation, epoch_state.epoch) != (self.me.generation, self.me.epoch):
            raise Moved(f"epoch {self.me.epoch} of policy {self._config.policy!r} is over")
        if self._ousted(self.me):  # all fell silent for too long: what is committed now, others commit
            raise Moved(f"another trainer has taken policy {self._config.policy!r} over")

    def _ousted(self, me: Membership) -> bool:
        return self._broker.call(self._members.is_ousted, self._config.policy, me.generation)

    def _evict(self, limits: dict[str, float]) -> None:
        self._broker.call(self._members.evict, self._config.policy, silent_s=self._config.silent_s, limits=limits)

    def check_stop(self) -> None:
        if self._stopping():
            raise Stopped("asked to stop")

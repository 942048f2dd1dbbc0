"""The replicas of a policy: who lives, what each of them trains of the open step, and the vote that commits it.

A replica may act as long as it is a member in the newest epoch of the newest generation; every call says in which it
believes it is, and one that is mistaken gets `Moved` and changes nothing. An epoch ends when a replica comes or goes, a
generation when none was left that had the newest weights and one was founded from a checkpoint. While replicas live,
the policy's writer lock is held by their generation; no single one of them owns it, or the lease of the open batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

from msgspec import Struct, structs
from redis.exceptions import ResponseError

from lachesis.broker.errors import Conflict, Diverged, LeaseLost, Moved
from lachesis.broker.records.entries import flat_entry
from lachesis.broker.records.groups import DeadEntry
from lachesis.broker.records.steps import LedgerEntry, Member, Membership
from lachesis.broker.retention.dead_letters import REFUSED_KEPT
from lachesis.broker.run_view import RunView
from lachesis.broker.store.redis_errors import trouble

CONSUMER = "replicas"  # who the batches of all replicas together are lent to
NO_WEIGHTS = -1  # in place of a step, by a replica whose weights are of no use to others


def new_id(name: str) -> str:
    """An id for one life of a replica; one that was evicted begins another."""
    return f"{name}:{uuid4().hex[:12]}"


class Rendezvous(Struct, frozen=True):
    """The replicas of one epoch, in the order in which they joined; the first one leads."""

    step: int  # that the newest weights are at
    steps: dict[str, int]  # that each replica's weights are at


class Claimed(Struct, frozen=True):
    """Groups that this replica is to train: (place in the batch, gid) of each."""

    groups: tuple[tuple[int, str], ...]
    left: int  # groups of the step that no living replica has


class EpochState(Struct, frozen=True):
    """Where a policy's replicas are."""

    generation: int
    epoch: int
    step: int  # newest that they committed
    open: int  # step in work, 0 if none
    won: int  # epoch in which `step` was committed, 0 if it was before this generation


class Members:
    """The replicas of one run's policies."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    # -- coming and going -----------------------------------------------------------------------------------------

    async def start_generation(
        self, policy: str, id_: str, *, token: str, step: int, hold_s: float
    ) -> Membership | None:
        """Begin a generation as its only replica, whose weights are at `step`; None if the writer lock is not `token`'s.

        From then on the generation holds the lock, for `hold_s` after the last beat. Raises Conflict if the ledger ends
        at another step.
        """
        keys = self._view.keys
        reply = await self._view.scripts.start_generation(
            keys=[
                *(keys.replicas(policy), keys.members(policy), keys.beats(policy), keys.work(policy)),
                *(keys.meeting(policy), keys.writer(policy), keys.ledger(policy), keys.control),
            ],
            args=[id_, token, step, _ms(hold_s)],
        )
        if reply[0] == b"behind":
            raise Conflict(f"policy {policy!r} can't be founded at step {step}: its ledger ends at another")
        return Membership(policy, id_, reply[1], reply[2]) if reply[0] == b"founded" else None

    async def join(self, policy: str, id_: str, *, generation: int, step: int) -> Membership | None:
        """Become a member with weights of that generation and step; None if there are no replicas to join."""
        keys = self._view.keys
        reply = await self._view.scripts.join(
            keys=[
                *(keys.replicas(policy), keys.members(policy), keys.beats(policy), keys.writer(policy)),
                keys.control,
            ],
            args=[id_, generation, step],
        )
        return Membership(policy, id_, reply[1], reply[2]) if reply[0] == b"joined" else None

    async def beat(self, policy: str, id_: str, *, hold_s: float) -> bool:
        """Say that a replica is alive. False if it is no member any more."""
        keys = self._view.keys
        reply = await self._view.scripts.replica_heartbeat(
            keys=[
                *(keys.replicas(policy), keys.members(policy), keys.beats(policy), keys.writer(policy)),
                *(keys.batches, keys.state),
            ],
            args=[id_, _ms(hold_s), policy],
            client=self._view.heartbeats,
        )
        return bool(reply)

    async def evict(
        self, policy: str, *, silent_s: float, limits: Mapping[str, float] | None = None, for_good: bool = False
    ) -> int:
        """Take away replicas whose last beat is older than `silent_s`, or than their own limit; 0 takes one away at once.

        `for_good`: those with a limit of 0 don't come back. If they were the last, the writer lock is free.
        """
        keys = self._view.keys
        pairs = [text for id_, limit_s in (limits or {}).items() for text in (id_, _ms(limit_s))]
        reply = await self._view.scripts.evict(
            keys=[
                *(keys.replicas(policy), keys.members(policy), keys.beats(policy), keys.writer(policy)),
                keys.control,
            ],
            args=[_ms(silent_s), int(for_good), *pairs],
        )
        return int(reply)

    # -- one epoch ------------------------------------------------------------------------------------------------

    async def rendezvous(self, me: Membership) -> Rendezvous | None:
        """Be here for the epoch; None while others are not. Raises Moved."""
        reply = await self._view.scripts.rendezvous(
            keys=[*self._team(me), self._view.keys.meeting(me.policy)], args=[me.id, me.generation, me.epoch]
        )
        self._check(me, reply[0])
        if reply[0] == b"waiting":
            return None
        _, step, *flat = reply
        return Rendezvous(step, {id_.decode(): at for id_, at in zip(flat[::2], flat[1::2], strict=True)})

    async def put_address(self, me: Membership, name: str, word: bytes) -> None:
        """Tell the others of this epoch something, such as where they reach this replica."""
        await self._view.scripts.set_fields(
            keys=[self._view.keys.meeting(me.policy)], args=[f"link:{me.epoch}:{name}", word]
        )

    async def get_address(self, me: Membership, name: str) -> bytes | None:
        found: bytes | None = await self._view.redis.hget(self._view.keys.meeting(me.policy), f"link:{me.epoch}:{name}")
        return found

    async def mark_current(self, me: Membership, step: int) -> None:
        """Count as one that has the newest weights, those of `step`. Raises Moved."""
        reply = await self._view.scripts.mark_current(keys=self._team(me), args=[me.id, me.generation, me.epoch, step])
        self._check(me, reply)

    async def open_step(self, me: Membership, step: int) -> bool:
        """Lay out the groups of a batch lent to CONSUMER; False if it is not (any more). Raises Moved."""
        keys = self._view.keys
        reply = await self._view.scripts.open_step(
            keys=[*self._team(me), keys.work(me.policy), keys.batches],
            args=[me.id, me.generation, me.epoch, step, me.policy],
        )
        self._check(me, reply)
        return bool(reply != b"gone")

    async def claim(self, me: Membership, step: int, *, count: int, held: int) -> Claimed | None:
        """Up to `count` more groups of the open step, for one that has `held` of them; None once members have them all.

        More than that, and groups it has, if an earlier reply was lost. Raises Moved, and LeaseLost if another step is open.
        """
        reply = await self._view.scripts.claim_groups(
            keys=[*self._team(me), self._view.keys.work(me.policy)],
            args=[me.id, me.generation, me.epoch, step, count, held],
        )
        self._check(me, reply[0])
        if reply[0] == b"closed":
            raise LeaseLost(f"step {step} of policy {me.policy!r} is not open any more")
        if reply[0] == b"done":
            return None
        _, left, *flat = reply
        groups = tuple((place, gid.decode()) for place, gid in zip(flat[::2], flat[1::2], strict=True))
        return Claimed(groups, left)

    async def vote(
        self, me: Membership, step: int, digest: str, entry: LedgerEntry, *, untrainable: Sequence[DeadEntry] = ()
    ) -> bool:
        """Say that this replica holds the step's gradients, which have that digest; True once all do: it is committed.

        Repeat it while it is False. `untrainable` is as in Queue.commit. Raises Moved; LeaseLost if the step can't be
        committed as it is; Diverged if another replica holds other gradients.
        """
        keys, policy = self._view.keys, me.policy
        entry = structs.replace(entry, at=entry.at or time.time())
        fields = [text for record in (*untrainable, entry) for text in flat_entry(record)]
        reply = await self._view.scripts.vote(
            keys=[
                *(*self._team(me), keys.work(policy), keys.batches, keys.ledger(policy)),
                *(keys.state, keys.writer(policy), keys.refused, keys.trained),
            ],
            args=[me.id, me.generation, me.epoch, step, digest, policy, REFUSED_KEPT, len(untrainable), *fields],
        )
        self._check(me, reply)
        if reply == b"diverged":
            raise Diverged(
                f"step {step} of policy {policy!r}: the replicas hold different sums of the same gradients. "
                "They must run the same versions, configuration and model"
            )
        if reply in (b"closed", b"gone", b"unclaimed"):
            raise LeaseLost(f"step {step} of policy {policy!r} can't be committed: {reply.decode()}")
        return bool(reply == b"committed")

    async def close_step(self, me: Membership, step: int, *, why: str) -> None:
        """Give the open step up, which can't be trained as it is. The epoch is over then: all meet anew, to open another.

        Raises Moved, and LeaseLost if another step is open.
        """
        reply = await self._view.scripts.close_step(
            keys=[*self._team(me), self._view.keys.work(me.policy), self._view.keys.control],
            args=[me.id, me.generation, me.epoch, step, why],
        )
        self._check(me, reply)
        if reply == b"other":
            raise LeaseLost(f"step {step} of policy {me.policy!r} is not open any more")

    # -- reading --------------------------------------------------------------------------------------------------

    async def epoch_state(self, policy: str) -> EpochState | None:
        """None if no replicas were ever founded, or the run was reset."""
        names = ("generation", "epoch", "step", "open", "won")
        [found] = await self._view.multiplexed.call(("HMGET", self._view.keys.replicas(policy), *names))
        return EpochState(*(int(value or 0) for value in found)) if found[0] else None

    async def hold_writer_lock(self, policy: str, generation: int) -> bool:
        """Whether replicas of that generation hold the policy's writer lock, so that one can join them."""
        found: bytes | None = await self._view.redis.get(self._view.keys.writer(policy))
        return found == f"{CONSUMER}-{generation}".encode()

    async def is_ousted(self, policy: str, generation: int) -> bool:
        """Whether somebody else holds it: one that founds another generation, or a trainer that trains alone."""
        found: bytes | None = await self._view.redis.get(self._view.keys.writer(policy))
        return found not in (None, f"{CONSUMER}-{generation}".encode())

    async def is_held(self, policy: str) -> bool:
        """Whether anyone holds the policy's writer lock."""
        return bool(await self._view.redis.exists(self._view.keys.writer(policy)))

    async def members(self, policy: str) -> list[Member]:
        """The living replicas, in the order in which they joined."""
        keys = self._view.keys
        raw = await self._view.redis.hgetall(keys.replicas(policy))
        beats = dict(await self._view.redis.zrange(keys.beats(policy), 0, -1, withscores=True))
        try:
            pending = await self._view.redis.xinfo_consumers(keys.work(policy), "trainers")
        except ResponseError as error:  # no step is open
            if trouble(error):
                raise
            pending = []
        holds = {consumer["name"]: consumer["pending"] for consumer in pending}
        return [
            Member(
                id=id_.decode(),
                step=int(raw.get(b"at:" + id_, NO_WEIGHTS)),
                holds=holds.get(id_, 0),
                trained=int(raw.get(b"trained:" + id_, 0)),
                voted=b"vote:" + id_ in raw,
                heartbeat=beats.get(id_, 0.0) / 1000,
                joined=int(raw.get(b"since:" + id_, 0)) / 1000,
            )
            for id_ in await self._view.redis.zrange(keys.members(policy), 0, -1)
        ]

    def _team(self, me: Membership) -> list[str]:
        return [self._view.keys.replicas(me.policy), self._view.keys.members(me.policy)]

    @staticmethod
    def _check(me: Membership, reply: bytes) -> None:
        if reply == b"moved":
            raise Moved(
                f"{me.id} is no member of policy {me.policy!r} in epoch {me.epoch} of generation {me.generation}"
            )


def _ms(seconds: float) -> int:
    return int(seconds * 1000)

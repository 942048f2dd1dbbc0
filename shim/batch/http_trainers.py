"""HTTP trainers: who asks for batches, and what each of them was sent.

Trainers of the Atropos API neither name themselves nor acknowledge. So one is known by its `X-Trainer-Id` header, by
`/trainers/<name>` in its URL or else by its address, together with the name of its token where the run has tokens; and
its request for the next batch acknowledges the one before, if that was sent to its last byte.
What was sent is kept in Redis: another replica of the shim, or the next process, goes on where this one ended.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time

import msgspec
import structlog
from msgspec import Struct
from redis.exceptions import ResponseError
from starlette.requests import Request

from lachesis.broker import Broker, LeaseLost
from lachesis.broker.errors import LimitReached
from lachesis.broker.records.entries import read_json, read_seconds
from lachesis.broker.records.keys import check_name
from lachesis.broker.records.steps import BatchEntry, Lease, LedgerEntry
from lachesis.shim.http.access import caller_of
from lachesis.shim.http.run_router import TRAINER
from lachesis.shim.intake.versions import Versions
from lachesis.shim.settings import ShimSettings

ACTIVE_S = 60.0  # a trainer that called within this time is alive
HTTP = "http:"  # before the names of consumers that are served over HTTP
MOST_TRAINERS = 1000  # that a run knows
CROWDED_S = 600.0  # where there is no room, the longest silent one is forgotten after this
LAST_BYTE_S = 1.0  # a replica that takes longer over the last byte has died

log = structlog.get_logger(role="shim")


class Sent(Struct):
    """A batch whose answer was sent, to its last byte or (for a moment) to just before it."""

    step: int
    reward: float  # mean score of its sequences
    at: float
    whole: bool


def consumer_of(request: Request) -> str:
    """The consumer name of the trainer that asks; no other token can have it. Raises ConfigurationError for an impossible name."""
    caller = caller_of(request)
    prefix = f"{HTTP}{caller.name}/" if caller else HTTP
    if (name := request.headers.get("x-trainer-id")) is not None:
        return prefix + check_name("X-Trainer-Id", name)
    if (name := request.scope.get(TRAINER)) is not None:
        return prefix + check_name("the trainer in the URL", name)
    return prefix + check_name("the address of the trainer", _address(request))


def _address(request: Request) -> str:
    """The address as a name: that of IPv6 in full, and with - between its words."""
    host = request.client.host if request.client else "local"
    try:
        return ipaddress.ip_address(host.partition("%")[0]).exploded.replace(":", "-")
    except ValueError:
        return host  # a proxy's word for it


def without_token(consumer: str) -> str:
    """What a trainer was called before it came with a token."""
    return HTTP + consumer.removeprefix(HTTP).rpartition("/")[2]


class HttpTrainers:
    """Consumers of one policy that are served over HTTP."""

    def __init__(self, broker: Broker, versions: Versions, settings: ShimSettings) -> None:
        self._broker, self._versions, self._policy = broker, versions, settings.policy
        self._lease_s, self._max_deliveries = settings.lease_s, settings.max_deliveries

    def _field(self, consumer: str) -> str:
        return f"sent:{self._policy}:{consumer}"

    async def saw(self, consumer: str) -> None:
        """The trainer is here. Raises LimitReached where it is new, and as many others as may be were here of late."""
        if not await self._broker.registry.note_trainer_call(
            consumer, self._policy, most=MOST_TRAINERS, crowded_s=CROWDED_S
        ):
            raise LimitReached(
                f"run {self._broker.keys.run!r} has {MOST_TRAINERS} HTTP trainers, and all of them called within {CROWDED_S:.0f} s: "
                "give each trainer one X-Trainer-Id, not one each time"
            )

    async def lease(self, consumer: str, batch_size: int) -> Lease | None:
        """The trainer's next batch: its unfinished one again, or a new one."""
        try:
            return await self._lease(consumer, batch_size)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
        await self._broker.queue.subscribe(self._policy)
        return await self._lease(consumer, batch_size)

    async def _lease(self, consumer: str, batch_size: int) -> Lease | None:
        await self.refit()
        return await self._broker.queue.lease_or_form(
            self._policy, consumer, batch_size, lapse_s=self._lease_s, max_deliveries=self._max_deliveries
        )

    async def refit(self) -> None:
        """Make queue and batches fit the registered settings, where others were registered before."""
        await self._broker.queue.refit.if_due(self._policy)

    async def take_apart(self, step: int) -> None:
        """Have the batch of a step, which can't be handed out, taken apart: its other groups are queued again."""
        await self._broker.queue.refit(self._policy, apart=[step])

    async def sending(self, consumer: str, step: int, reward: float) -> None:
        """The last byte follows now. A trainer that has it may call another replica before that one can know."""
        await self._note(consumer, Sent(step, reward, time.time(), whole=False))

    async def sent(self, consumer: str, step: int, reward: float) -> None:
        await self._note(consumer, Sent(step, reward, time.time(), whole=True))

    async def not_sent(self, consumer: str, step: int) -> None:
        """The batch turned out not to have arrived: its trainer will get it again."""
        if (sent := await self._last(consumer)) and sent.step == step:
            await self._broker.redis.hdel(self._broker.keys.state, self._field(consumer))

    async def acknowledge(self, consumer: str) -> None:
        """Commit the batch that was sent to this trainer last, free it, and forget it."""
        sent = await self._last(consumer)
        if sent is None and (before := without_token(consumer)) != consumer:
            consumer, sent = before, await self._last(before)
        until = time.monotonic() + LAST_BYTE_S  # whatever the other replica's clock says
        while sent and not sent.whole and time.time() < sent.at + LAST_BYTE_S and time.monotonic() < until:
            await asyncio.sleep(0.005)
            sent = await self._last(consumer)
        if sent is None or not sent.whole:
            return
        batch = await self._broker.queue.batch(sent.step)
        batch = batch or BatchEntry(
            sent.step, (), 1, 0, 0, 0, 0.0
        )  # it is gone: COMMIT knows whether this trainer trained it
        version = await self._versions.newest()
        entry = LedgerEntry(
            step=batch.step,
            gids=batch.gids,
            n=batch.n,
            tok=batch.tok,
            v_before=version,
            v_after=version,
            v_min=batch.v_min,
            lag=version - batch.v_min,
            replica=consumer,
            reward=sent.reward,
            loss=0.0,  # an HTTP trainer keeps it to itself
            seconds=time.time() - sent.at,
        )
        try:
            await self._broker.queue.commit(self._policy, Lease(batch, consumer, 1), entry)
        except LeaseLost as error:
            log.warning("batch_lost", trainer=consumer, step=batch.step, reason=str(error))
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            log.warning("batch_lost", trainer=consumer, step=batch.step, reason="all batches were deleted")
            await self._broker.queue.subscribe(self._policy)
        await self._broker.queue.retire(self._policy, await self._broker.queue.settled(self._policy))
        await self._broker.redis.hdel(self._broker.keys.state, self._field(consumer))

    async def active(self) -> str | None:
        """In words, who trains now: a native trainer holding the writer lock, or an HTTP trainer seen lately."""
        if await self._broker.registry.writer(self._policy, ttl_s=1).locked():
            return f"a trainer holds policy {self._policy!r}"
        fields = await self._broker.redis.hgetall(self._broker.keys.trainers)
        seen = {name: read_seconds(at) for name, at in fields.items() if name.startswith(b"http:")}
        if not seen:
            return None
        name = max(seen, key=lambda trainer: seen[trainer])
        ago = time.time() - seen[name]
        return f"trainer {name.decode()} was here {ago:.0f} s ago" if abs(ago) < ACTIVE_S else None

    async def _note(self, consumer: str, sent: Sent) -> None:
        await self._broker.scripts.set_fields(
            keys=[self._broker.keys.state], args=[self._field(consumer), msgspec.json.encode(sent)]
        )

    async def _last(self, consumer: str) -> Sent | None:
        raw = await self._broker.redis.hget(self._broker.keys.state, self._field(consumer))
        return read_json(Sent, raw)

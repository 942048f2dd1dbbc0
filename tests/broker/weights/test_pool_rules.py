"""A pool's rule, its canaries, and turns to update."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lachesis.broker import Broker
from lachesis.broker.records.versions import PoolRule, WeightsEntry
from lachesis.broker.weights.pools import NEWEST, NONE, canaries

pytestmark = pytest.mark.anyio

SHARES = st.floats(0.01, 0.99)
SERVERS = st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=40)


@given(servers=SERVERS, share=SHARES)
async def test_canaries_are_the_share_and_never_all(servers: set[str], share: float) -> None:
    chosen = canaries(PoolRule("canary", 2, 1, share), servers)

    assert chosen <= servers
    assert len(chosen) < len(servers)
    assert abs(len(chosen) - share * len(servers)) <= 1
    assert chosen or len(servers) == 1


@given(servers=SERVERS, share=SHARES, comes=st.text(min_size=9, max_size=9))
async def test_who_comes_or_goes_changes_at_most_one_others_part(servers: set[str], share: float, comes: str) -> None:
    rule = PoolRule("canary", 2, 1, share)

    changed = canaries(rule, servers) ^ (canaries(rule, servers | {comes}) - {comes})

    assert len(changed) <= 1


async def test_other_rules_have_no_canaries() -> None:
    assert canaries(NEWEST, ["a", "b"]) == canaries(PoolRule("pin", 1), ["a", "b"]) == set()


async def test_a_rule_is_made_once_and_only_in_the_place_of_the_one_judged(broker: Broker) -> None:
    assert await broker.pools.rule("main") == (NONE, NEWEST)
    pin, canary = PoolRule("pin", 7), PoolRule("canary", 8, 7, 0.25)
    assert await broker.pools.set_rule("main", pin, NONE)
    assert await broker.pools.set_rule("main", pin, NONE)  # sent again
    assert await broker.redis.xlen(broker.keys.rule("main")) == 1
    assert not await broker.pools.set_rule("main", canary, NONE)
    judged, rule = await broker.pools.rule("main")
    assert rule == pin
    assert await broker.pools.set_rule("main", canary, judged)
    assert (await broker.pools.rule("main"))[1] == canary
    assert (await broker.pools.rule("other"))[1] == NEWEST


async def test_a_follower_wakes_up_for_a_rule_and_for_a_version(broker: Broker) -> None:
    known = await broker.pools.orders("main", "main")
    waiting = asyncio.create_task(broker.pools.wait_for_orders("main", "main", known, 60))
    await broker.pools.set_rule("main", PoolRule("pin", 3), NONE)
    with anyio.fail_after(20):
        await waiting

    known = await broker.pools.orders("main", "main")
    assert known.rule == PoolRule("pin", 3)
    waiting = asyncio.create_task(broker.pools.wait_for_orders("main", "main", known, 60))
    await broker.weights.publish("main", WeightsEntry(4, 4, "/v4", "0", 1, "BF16", 0))
    with anyio.fail_after(20):
        await waiting
    newest = (await broker.pools.orders("main", "main")).newest
    assert newest is not None
    assert newest.version == 4


async def test_so_many_update_at_once_and_what_a_dead_one_holds_lapses(broker: Broker) -> None:
    pools = broker.pools
    assert await pools.take_turn("main", "a", 2, 60)
    assert await pools.take_turn("main", "b", 2, 60)
    assert not await pools.take_turn("main", "c", 2, 60)
    assert await pools.take_turn("main", "a", 2, 60)  # goes on
    assert await pools.take_turn("other", "c", 1, 60)
    await pools.end_turn("main", "a")
    assert await pools.take_turn("main", "c", 2, 0.2)
    assert not await pools.take_turn("main", "a", 2, 60)
    with anyio.fail_after(20):
        while not await pools.take_turn("main", "a", 2, 60):  # noqa: ASYNC110  `c` was killed
            await anyio.sleep(0.05)


async def test_many_at_once_never_get_more_turns_than_there_are(broker: Broker) -> None:
    asked = [broker.pools.take_turn("main", f"s{number}", 3, 60) for number in range(20)]
    assert sum(await asyncio.gather(*asked)) == 3

"""The short form of `make chaos`, and that its verdict can be a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabric import Truth, judge, run

from lachesis.broker import Broker
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.steps import LedgerEntry

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

KILLS, KILLS_LONG = 25, 500


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fsync", ["everysec", "always"])
async def test_nothing_is_lost_or_doubled_whatever_is_killed(tmp_path: Path, fsync: str, long_form: bool) -> None:
    kills = KILLS_LONG if long_form else KILLS
    report = await run(tmp_path, kills=kills, fsync=fsync)
    print(report)
    assert report["wrong"] == []
    assert report["accepted"] > 10 * kills
    assert report["trained"] > 0.9 * report["accepted"]


async def test_a_lost_and_a_doubled_group_are_found(broker: Broker) -> None:
    gids = [f"{number:024x}" for number in range(3)]
    for number, gid in enumerate(gids):
        tokens = [[number, index] for index in range(8)]
        await broker.queue.put(gid, ScoredGroup(tokens, tokens, [0.0] * 8), v_min=0, v_max=0)
    truth = Truth(accepted=set(gids))
    assert (await judge(broker, truth, 0.0))["wrong"] == []

    await broker.queue.subscribe("main")
    lease = await broker.queue.lease_or_form("main", "t", 16, lapse_s=0)
    assert lease is not None
    batch = lease.batch
    entry = LedgerEntry(
        step=1, gids=(batch.gids[0], batch.gids[0]), n=16, tok=32, v_before=0, v_after=0, v_min=0, lag=0, replica="t",
        reward=0.0, loss=0.0, seconds=0.0,
    )  # fmt: skip
    await broker.queue.commit("main", lease, entry)
    report = await judge(broker, truth, 0.0)
    assert (report["lost"], report["doubled"]) == (1, 1)
    assert any("lost" in finding for finding in report["wrong"])

    await broker.redis.hincrby(broker.keys.state, "sequences", 1)
    assert any("counters" in finding for finding in (await judge(broker, truth, 0.0))["wrong"])

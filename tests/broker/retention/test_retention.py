"""What is freed, when, and for whom it waits."""

from __future__ import annotations

import itertools
import os
import signal
import sys

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained_run import train, unfreed

from lachesis.broker import Broker, ConfigurationError, EmbeddedRedis

pytestmark = pytest.mark.anyio
runs = itertools.count()


async def blobs(broker: Broker) -> int:
    return len(await broker.redis.keys(broker.keys.blob("*")))


async def test_by_default_nothing_trained_is_kept(broker: Broker) -> None:
    await train(broker, 3)
    kept = await broker.queue.retention.kept()
    assert (kept.batches, kept.bytes, kept.first, kept.keep_bytes) == (0, 0, 0, 0)
    assert await blobs(broker) == len(await broker.queue.queued())


async def test_the_newest_batches_are_kept_as_far_as_they_fit(broker: Broker) -> None:
    retention = broker.queue.retention
    await retention.keep(1 << 30)
    stored = await train(broker, 6)
    sizes = {step: sum(map(len, groups)) for step, groups in stored.items()}
    assert await unfreed(broker) == stored
    assert (await retention.kept()).bytes == sum(sizes.values())

    room = sizes[4] + sizes[5] + sizes[6]
    await retention.keep(room)
    assert await retention.free() == 3
    kept = await retention.kept()
    assert (kept.first, kept.last, kept.bytes) == (4, 6, room)
    await train(broker, 4, start=1)
    kept = await retention.kept()
    assert (kept.last, kept.batches) == (10, 11 - kept.first)
    assert 0 < kept.bytes <= room

    await retention.keep(0)
    assert await retention.free() > 0
    assert (await retention.kept()).bytes == 0


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(1, 6),
    moves=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(("main", "shadow")), st.integers(0, 6)),
            st.tuples(st.just("keep"), st.integers(0, 1500)),
        ),
        max_size=8,
    ),
)
async def test_what_is_kept_is_what_is_needed_or_fits(
    shared_redis: EmbeddedRedis, steps: int, moves: list[tuple[str, int]]
) -> None:
    broker = await Broker.connect(shared_redis.url, f"retention{next(runs)}")
    try:
        await broker.queue.subscribe("shadow")
        stored = await train(broker, steps, covered=False)
        sizes = {step: sum(map(len, groups)) for step, groups in stored.items()}
        covered, keep, kept = {"main": 0, "shadow": 0}, 0, sorted(stored)
        for name, value in moves:
            if name == "keep":
                keep = value
                await broker.queue.retention.keep(value)
            else:
                covered[name] = max(covered[name], min(value, steps))  # a late mark takes nothing back
                await broker.queue.retire(name, min(value, steps))
                while kept and kept[0] <= min(covered.values()) and (not keep or sum(sizes[s] for s in kept) > keep):
                    kept.pop(0)
            assert await unfreed(broker) == {step: stored[step] for step in kept}
            assert (await broker.queue.retention.kept()).bytes == sum(sizes[step] for step in kept)
    finally:
        await broker.aclose()


async def test_settings_and_marks_spoilt_by_hand_hold_nothing_back(broker: Broker) -> None:
    await broker.queue.retention.keep(1 << 30)
    await train(broker, 3)
    await broker.redis.hset(broker.keys.settings, "keep_bytes", "much")
    await broker.redis.hset(broker.keys.state, "covered:main", "all of them")
    assert await broker.queue.retention.free() == 0  # a mark that can't be read covers nothing
    assert await broker.queue.retire("main", 3) == 3
    assert (await broker.queue.retention.kept()).keep_bytes == 0


async def test_a_setting_survives_a_reset_and_the_counters_start_again(broker: Broker) -> None:
    await broker.queue.retention.keep(12345)
    await train(broker, 2)
    await broker.reset()
    kept = await broker.queue.retention.kept()
    assert (kept.keep_bytes, kept.bytes, kept.batches, kept.covered) == (12345, 0, 0, {})


async def test_a_trainer_from_before_a_reset_frees_nothing_after_it(broker: Broker) -> None:
    await train(broker, 3, covered=False)
    await broker.reset()
    await broker.queue.retire("main", 3)
    stored = await train(broker, 2, covered=False)
    assert await broker.queue.retention.free() == 0
    assert await unfreed(broker) == stored


async def test_who_leaves_holds_nothing_back(broker: Broker) -> None:
    await broker.queue.subscribe("shadow")
    await train(broker, 2)
    assert len(await unfreed(broker)) == 2
    assert await broker.queue.retention.leave("shadow")
    assert not await broker.queue.retention.leave("shadow")
    assert await broker.queue.retention.free() == 2


async def test_the_archivers_name_is_no_policys(broker: Broker) -> None:
    with pytest.raises(ConfigurationError, match="that name is the archiver's"):
        await broker.queue.subscribe("archive")


async def test_freeing_killed_half_way_is_finished_by_the_next(broker: Broker) -> None:
    await train(broker, 5, covered=False)
    code = (
        "import sys\nfrom lachesis.broker import connect_blocking\n"
        "with connect_blocking(*sys.argv[1:]) as b: b.call(b.broker.queue.retire, 'main', 5)"
    )
    killed = await anyio.run_process(
        [sys.executable, "-c", code, broker.url, broker.keys.run],
        env=os.environ | {"LACHESIS_CRASH_AT": "retired:2"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    left = await unfreed(broker)
    assert sorted(left) == [3, 4, 5]
    assert (await broker.queue.retention.kept()).bytes == sum(len(blob) for groups in left.values() for blob in groups)
    assert await broker.queue.retire("main", 5) == 3
    assert await blobs(broker) == len(await broker.queue.queued())

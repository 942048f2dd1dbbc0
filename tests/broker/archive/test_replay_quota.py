"""What a replay's PUT waits for, and which ids its groups get; the command itself: tests/cli/test_replay.py."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from scored import group, trained

from lachesis.broker import Broker
from lachesis.broker.archive.replay import Part, Replayed, store
from lachesis.broker.audit import audit
from lachesis.broker.records.groups import Group
from lachesis.broker.records.packing import to_arrays
from lachesis.broker.records.registrations import TrainerConfig

pytestmark = pytest.mark.anyio
QUOTA = 400  # bytes: two of the groups


def part(step: int, *numbers: int) -> Part:
    groups: list[Group] = []
    for number in numbers:
        groups.append(to_arrays(group(number)))
        groups[-1].gid = f"g{number}"
    return Part(step, groups)


async def replay(broker: Broker, done: Replayed, *parts: Part, quota: int = QUOTA) -> None:
    for each in parts:
        await store(broker, each, done, policy="main", keep_versions=False, quota=quota, tell=lambda: None)


async def register(broker: Broker, batch_size: int) -> None:
    await broker.registry.register_trainer(TrainerConfig("g", "p", batch_size, 16, "", 1, 0, 1))


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, (1, 2, 3, 4)), (16, tuple(range(1, 9)))])
async def test_a_quota_holds_nothing_back_while_no_batch_can_be_made(
    broker: Broker, batch_size: int, sizes: tuple[int, ...]
) -> None:
    await register(broker, batch_size)
    with anyio.fail_after(30):
        await replay(broker, done := Replayed(), part(1, *sizes))
    assert (done.stored, done.waiting) == (len(sizes), "")
    assert await broker.queue.form(batch_size) == 1


async def test_a_quota_holds_back_what_no_batch_needs_until_one_is_taken(broker: Broker) -> None:
    await register(broker, 4)
    await broker.queue.subscribe("main")
    done = Replayed()
    replaying = asyncio.create_task(replay(broker, done, part(1, *range(1, 7))))
    taken: list[str] = []
    with anyio.fail_after(30):
        while len(taken) < 6:
            assert (await broker.queue.status()).bytes <= QUOTA
            lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=60)
            if lease is None:
                await asyncio.sleep(0.01)
                continue
            taken += lease.batch.gids
            await broker.queue.commit("main", lease, trained(lease.batch))
        await replaying
    assert taken == [f"g{number}" for number in range(1, 7)]


async def test_without_a_registration_nobody_knows_what_a_batch_is_and_the_quota_holds(broker: Broker) -> None:
    done = Replayed()
    replaying = asyncio.create_task(replay(broker, done, part(1, 1, 2, 3)))
    with anyio.fail_after(30):
        while not done.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert done.waiting == "the queue is full"
        await register(broker, 8)
        await replaying
    assert done.stored == 3


async def test_every_epoch_of_an_archive_is_replayed_and_none_twice(broker: Broker) -> None:
    for stored in (6, 0):
        await replay(broker, done := Replayed(), part(1, 1, 2), part(2, 2, 1), part(3, 1, 2), quota=0)
        assert (done.groups, done.stored) == (6, stored)
    gids = [entry.gid for _, entry in await broker.queue.queued()]
    assert gids[:2] == ["g1", "g2"]
    assert len(set(gids)) == 6
    for _ in range(3):
        await broker.queue.subscribe("main")
        lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=60)
        assert lease is not None
        assert len(await broker.queue.fetch(lease.batch.gids)) == 2
        await broker.queue.commit("main", lease, trained(lease.batch))
        await broker.queue.retire("main", lease.batch.step)
    assert (await audit(broker)).findings == []
    await replay(
        broker, done := Replayed(), part(1, 1, 2), part(2, 2, 1), quota=0
    )  # within the day, though all is freed
    assert done.stored == 0

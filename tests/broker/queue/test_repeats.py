"""A repeated post: a retry while its group is unfinished or young, a group of its own after that. Age is `seen` gone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from queued import dead, lease, put
from replicas import opened
from scored import group, trained

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.records.groups import DUPLICATE_WINDOW_S, Limits

pytestmark = pytest.mark.anyio


async def queued(broker: Broker) -> None:
    await put(broker, 1, 2)


async def batched(broker: Broker) -> None:
    await put(broker, 1, 2)
    await broker.queue.subscribe("main")
    assert await broker.queue.form(4) == 1


async def leased(broker: Broker) -> None:
    await put(broker, 1, 2)
    await lease(broker)


async def in_work(broker: Broker) -> None:
    await put(broker, 1, 2)
    await opened(broker)


async def given_up_by_one_policy(broker: Broker) -> None:
    await broker.queue.subscribe("shadow")
    await leased(broker)
    assert await broker.queue.lease("main", "a", lapse_s=0, max_deliveries=1) is None
    assert await broker.dead.accepted() == []


async def dead_letters(broker: Broker) -> None:
    await leased(broker)
    assert await broker.queue.lease("main", "a", lapse_s=0, max_deliveries=1) is None
    assert [gid for gid, *_ in await dead(broker)] == ["g1", "g2"]


async def requeued(broker: Broker) -> None:
    await dead_letters(broker)
    for letter in await broker.dead.accepted():
        (kept,) = await broker.queue.fetch([letter.entry.gid])
        assert await broker.dead.requeue(letter, kept, len(await broker.dead.body(letter)))


async def grow_old(broker: Broker) -> None:
    """As after the window: what only time forgets is forgotten."""
    assert await broker.redis.delete(*(broker.keys.seen(f"g{number}") for number in (1, 2)))


@pytest.mark.parametrize(
    "place", [queued, batched, leased, in_work, given_up_by_one_policy, dead_letters, requeued],
)  # fmt: skip
async def test_a_group_is_known_for_as_long_as_it_is_unfinished(
    broker: Broker, place: Callable[[Broker], Awaitable[None]]
) -> None:
    await place(broker)
    await grow_old(broker)
    assert [await broker.queue.put("g1", group(1), v_min=0, v_max=0) for _ in range(2)] == ["duplicate"] * 2
    status = await broker.queue.status()
    assert (status.accepted, status.duplicates) == (2, {"0": 2})
    assert (await audit(broker)).findings == []
    assert [found.gid for found in await broker.queue.fetch(["g1", "g2"])] == ["g1", "g2"]


async def test_a_group_is_known_within_the_window_though_it_is_trained_and_freed(broker: Broker) -> None:
    await put(broker, 1, 2)
    assert 0 < await broker.redis.ttl(broker.keys.seen("g1")) <= DUPLICATE_WINDOW_S
    held = await lease(broker)
    await broker.queue.commit("main", held, trained(held.batch))
    assert await broker.queue.retire("main", 1) == 1
    assert await broker.queue.put("g1", group(1), v_min=0, v_max=0) == "duplicate"


@pytest.mark.parametrize("aged", [True, False], ids=["after the window", "without a window"])
@pytest.mark.parametrize("freed", [True, False], ids=["freed", "kept"])
async def test_every_epoch_of_a_data_set_is_trained(broker: Broker, aged: bool, freed: bool) -> None:
    """Also where what is trained is still kept: for a checkpoint that comes after more steps than an epoch has, or by `keep_bytes`."""
    window_s = DUPLICATE_WINDOW_S if aged else 0
    for epoch in (1, 2, 3):
        for number in (1, 2):
            assert await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0, window_s=window_s) == "stored"
        assert await broker.queue.put("g1", group(1), v_min=0, v_max=0, window_s=window_s) == "duplicate"
        held = await lease(broker)
        fetched = await broker.queue.fetch(held.batch.gids)
        assert [[row.tolist() for row in found.tokens] for found in fetched] == [group(1).tokens, group(2).tokens]
        await broker.queue.commit("main", held, trained(held.batch))
        if freed:
            assert await broker.queue.retire("main", epoch) == 1
        if aged:
            await grow_old(broker)
        assert (await audit(broker)).findings == []
    kept = [gid for batch in await broker.queue.batches() for gid in batch.gids]
    assert len(kept) == (0 if freed else 6)
    assert len(set(kept)) == len(kept)
    assert await broker.redis.hlen(broker.keys.trained) == len(kept)
    assert await broker.queue.retire("main", 3) == (0 if freed else 3)
    assert not await broker.redis.exists(broker.keys.trained)
    assert (await audit(broker)).trained == 6


async def test_a_repeat_that_finds_no_room_leaves_one_blob_however_often_it_tries(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker)
    await broker.queue.commit("main", held, trained(held.batch))
    await put(broker, 3)
    await grow_old(broker)
    for _ in range(3):
        assert await broker.queue.put("g1", group(1), v_min=0, v_max=0, limits=Limits(sequences=1)) == "full"
    assert len(await broker.redis.keys(broker.keys.blob("*"))) == 4
    await put(broker, 1)
    assert [entry.gid for _, entry in await broker.queue.queued()] == ["g3", "g1~1"]


async def test_ids_of_a_replay_are_followed_to_an_end(broker: Broker) -> None:
    await broker.redis.hset(broker.keys.trained, mapping={"g1": 5, "g1~5": 3, "g1~3": 5})
    await broker.redis.set(broker.keys.blob("g1"), b"kept")
    await put(broker, 1)
    ((_, entry),) = await broker.queue.queued()
    assert entry.gid.startswith("g1~5~")


async def test_a_purged_dead_letter_may_come_again_and_keeps_its_data(broker: Broker) -> None:
    await dead_letters(broker)
    await grow_old(broker)
    for letter in await broker.dead.accepted():
        assert await broker.dead.purge(letter, who="test")
    await put(broker, 1, 2)
    held = await lease(broker)
    assert len(await broker.queue.fetch(held.batch.gids)) == 2
    assert (await audit(broker)).findings == []


async def test_a_reset_forgets_every_group_of_a_post(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker)
    await broker.queue.commit("main", held, trained(held.batch))
    await grow_old(broker)
    await put(broker, 1, 2)
    await broker.reset()
    assert await broker.redis.keys(broker.keys.groups.removesuffix("groups") + "*") == []
    await put(broker, 1, 2)


async def test_a_known_id_with_another_body_is_a_conflict_however_old(broker: Broker) -> None:
    async def reply(number: int, digest: str) -> str:
        return await broker.queue.put("key", group(number), v_min=0, v_max=0, digest=digest)

    assert [await reply(1, "one"), await reply(1, "one"), await reply(2, "two")] == ["stored", "duplicate", "conflict"]
    await broker.redis.delete(broker.keys.seen("key"))
    assert [await reply(1, "one"), await reply(2, "two")] == ["duplicate", "conflict"]
    status = await broker.queue.status()
    assert (status.accepted, status.groups) == (1, 1)


async def test_the_audit_finds_a_group_that_is_trained_again_unless_it_was_accepted_again(broker: Broker) -> None:
    for _ in range(2):
        await put(broker, 1, 2)
        held = await lease(broker)
        await broker.queue.commit("main", held, trained(held.batch))
        await broker.queue.retire("main", held.batch.step)
        await grow_old(broker)
    assert (await audit(broker)).findings == []
    await broker.redis.hincrby(broker.keys.state, "accepted", -1)
    assert "3 groups were accepted, 4 are accounted for" in (await audit(broker)).findings
    assert "groups in more than one place: g1, g2" in (await audit(broker)).findings

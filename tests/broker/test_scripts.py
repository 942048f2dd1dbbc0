"""Every script on a real Redis, each called twice: a client may send any of them again."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from scored import group, trained

from lachesis.broker import Broker, LeaseLost
from lachesis.broker.codec import pack, to_entry
from lachesis.broker.queue import BLOB_TTL_S, SEEN_TTL_S
from lachesis.broker.records import BatchEntry, EnvConfig, Lease

pytestmark = pytest.mark.anyio
ENV = EnvConfig(max_token_length=16, desired_name="sums", weight=1.0, group_size=2)


async def put(broker: Broker, *numbers: int, size: int = 2) -> None:
    for number in numbers:
        assert await broker.queue.put(f"g{number}", group(number, size), v_min=0, v_max=0) == "stored"


async def lease(broker: Broker, consumer: str = "a", batch_size: int = 4, lapse_s: float = 600) -> Lease:
    await broker.queue.subscribe("main")
    found = await broker.queue.lease_or_form("main", consumer, batch_size, lapse_s=lapse_s)
    assert found is not None
    return found


# -- PUT ----------------------------------------------------------------------------------------------------------


async def test_put_twice_stores_once(broker: Broker) -> None:
    await put(broker, 1)
    before = await broker.queue.status()
    assert await broker.queue.put("g1", group(1), v_min=0, v_max=0) == "duplicate"
    assert await broker.queue.status() == before
    assert (before.accepted, before.groups, before.sequences, before.sizes) == (1, 1, 2, {2: 1})
    assert (before.env_groups, before.env_sequences) == ({"0": 1}, {"0": 2})


async def test_a_blob_loses_its_ttl_when_it_is_queued_and_not_before(broker: Broker) -> None:
    keys, blob = broker.keys, pack(group(1), "g1", v_min=0, v_max=0)
    await broker.redis.set(keys.blob("g1"), blob, ex=BLOB_TTL_S)  # as a shim that dies before PUT leaves it
    assert 0 < await broker.redis.ttl(keys.blob("g1")) <= BLOB_TTL_S
    await put(broker, 1)
    assert await broker.redis.ttl(keys.blob("g1")) == -1
    assert 0 < await broker.redis.ttl(keys.seen("g1")) <= SEEN_TTL_S


async def test_a_post_repeated_after_its_group_was_freed_leaves_only_what_expires(broker: Broker) -> None:
    await put(broker, 1, 2)
    await broker.queue.commit("main", held := await lease(broker), trained(held.batch))
    await broker.queue.retire("main", 1)
    assert await broker.queue.put("g1", group(1), v_min=0, v_max=0) == "duplicate"
    assert 0 < await broker.redis.ttl(broker.keys.blob("g1")) <= BLOB_TTL_S


async def test_put_without_its_blob_changes_nothing(broker: Broker) -> None:
    keys = broker.keys
    reply = await broker.scripts.put(
        keys=[keys.groups, keys.blob("g1"), keys.seen("g1"), keys.state], args=[60, 0, "0", 2, 100, "gid", "g1"]
    )
    assert reply == b"noblob"
    assert not await broker.redis.exists(keys.groups, keys.seen("g1"), keys.state)


async def test_the_quota_refuses_what_does_not_fit_but_never_the_only_group(broker: Broker) -> None:
    assert await broker.queue.put("g1", group(1), v_min=0, v_max=0, quota=1) == "stored"
    assert await broker.queue.put("g2", group(2), v_min=0, v_max=0, quota=1) == "full"
    assert (await broker.queue.status()).accepted == 1
    assert await broker.redis.ttl(broker.keys.blob("g2")) > 0


# -- FORM ---------------------------------------------------------------------------------------------------------


async def form(broker: Broker, step: int, total: int, ids: list[str]) -> bytes:
    keys = broker.keys
    batch = BatchEntry(step=step, gids=("g1", "g2"), n=total, tok=12, v_min=0, v_max=0, formed_at=0.0)
    fields = [text for pair in to_entry(batch).items() for text in pair]
    reply: bytes = await broker.scripts.form(
        keys=[keys.groups, keys.batches, keys.state], args=[step, total, len(ids), *ids, *fields]
    )
    return reply


async def snapshot(broker: Broker) -> Any:
    redis, keys = broker.redis, broker.keys
    return await redis.xrange(keys.groups), await redis.xrange(keys.batches), await redis.hgetall(keys.state)


async def test_form_moves_all_or_none_and_only_once(broker: Broker) -> None:
    await put(broker, 1, 2, 3)
    ids = [id_ for id_, _ in await broker.queue.queued()]
    assert await form(broker, 1, 4, ids[:2]) == b"formed"
    after = await snapshot(broker)
    for step, total, chosen in ((1, 4, ids[:2]), (2, 4, ids[1:]), (2, 4, ids[2:]), (3, 2, ids[2:])):
        assert await form(broker, step, total, chosen) == b"conflict"
    assert await snapshot(broker) == after
    status = await broker.queue.status()
    assert (status.formed, status.delivered) == (1, 0)
    assert (status.groups, status.sequences) == (3, 6)  # a formed batch counts until it is delivered
    assert (status.sizes, status.env_sequences) == ({2: 1}, {"0": 2})


# -- LEASE --------------------------------------------------------------------------------------------------------


async def test_a_lease_asked_for_twice_is_the_same_batch(broker: Broker) -> None:
    await put(broker, 1, 2, 3, 4)
    first, again = await lease(broker), await lease(broker)
    assert first.batch == again.batch
    assert (first.deliveries, again.deliveries) == (1, 2)
    status = await broker.queue.status()
    assert (status.formed, status.delivered, status.groups) == (1, 1, 2)


async def test_only_a_lapsed_lease_goes_to_another_consumer(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker, "a")
    assert await broker.queue.lease("main", "b", lapse_s=600) is None
    await broker.queue.renew("main", held)
    taken = await broker.queue.lease("main", "b", lapse_s=0)
    assert taken is not None
    assert taken.batch == held.batch
    assert await broker.queue.lease("main", "a", lapse_s=600) is None


async def test_each_policy_gets_every_batch(broker: Broker) -> None:
    await put(broker, 1, 2)
    await broker.queue.subscribe("shadow")
    await broker.queue.subscribe("shadow")
    main = await lease(broker)
    shadow = await broker.queue.lease("shadow", "s", lapse_s=600)
    assert shadow is not None
    assert shadow.batch == main.batch


# -- COMMIT -------------------------------------------------------------------------------------------------------


async def test_commit_twice_writes_one_ledger_entry(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker)
    for _ in range(2):
        await broker.queue.commit("main", held, trained(held.batch))
    assert [entry.step async for entry in broker.queue.ledger("main")] == [1]
    assert await broker.queue.settled("main") == 1


async def test_steps_that_finish_out_of_order_are_all_in_the_ledger_once(broker: Broker) -> None:
    await put(broker, 1, 2, 3, 4)
    first, second = await lease(broker, "a"), await lease(broker, "b")
    await broker.queue.commit("main", second, trained(second.batch))
    assert await broker.queue.settled("main") == 0
    for _ in range(2):
        await broker.queue.commit("main", first, trained(first.batch))
    assert [entry.step async for entry in broker.queue.ledger("main")] == [2, 1]
    assert await broker.queue.settled("main") == 2


async def test_a_batch_that_another_took_over_is_stolen(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker, "a")
    await broker.queue.lease("main", "b", lapse_s=0)
    with pytest.raises(LeaseLost, match=r"step 1 of policy 'main'.*another consumer took it"):
        await broker.queue.commit("main", held, trained(held.batch))
    assert await broker.queue.newest_committed("main") is None


async def test_a_batch_nobody_holds_is_gone(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker)
    await broker.redis.xack(broker.keys.batches, "main", "1-0")
    with pytest.raises(LeaseLost, match="nobody holds it"):
        await broker.queue.commit("main", held, trained(held.batch))


async def test_a_writer_that_lost_its_lock_is_fenced(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker)
    earlier, later = broker.parties.writer("main", ttl_s=60), broker.parties.writer("main", ttl_s=60)
    assert await earlier.acquire(blocking=False)
    assert not await later.acquire(blocking=False)
    old = earlier.local.token.decode()
    await broker.redis.delete(broker.keys.writer("main"))  # as if its time had run out
    assert await later.acquire(blocking=False)
    with pytest.raises(LeaseLost, match="another process writes"):
        await broker.queue.commit("main", held, trained(held.batch), token=old)
    await broker.queue.commit("main", held, trained(held.batch), token=later.local.token.decode())


# -- RETIRE, RESET ------------------------------------------------------------------------------------------------


async def test_a_batch_is_freed_when_every_policy_covers_it(broker: Broker) -> None:
    await put(broker, 1, 2)
    await broker.queue.subscribe("shadow")
    held = await lease(broker)
    await broker.queue.commit("main", held, trained(held.batch))
    assert await broker.queue.retire("main", 1) == 0
    assert await broker.queue.batch(1) == held.batch
    assert len(await broker.queue.fetch(held.batch.gids)) == 2
    assert await broker.queue.retire("shadow", 1) == 1
    assert await broker.queue.retire("shadow", 1) == 0
    assert await broker.queue.batch(1) is None
    with pytest.raises(LookupError, match="group g1 has no blob"):
        await broker.queue.fetch(["g1"])


async def test_reset_forgets_the_queue_and_lets_posts_be_repeated(broker: Broker) -> None:
    await put(broker, 1, 2, 3)
    held = await lease(broker)
    await broker.queue.commit("main", held, trained(held.batch))
    await broker.queue.retire("main", 1)
    for _ in range(2):
        await broker.reset()
    assert await broker.redis.keys(broker.keys.groups.removesuffix("groups") + "*") == []
    await put(broker, 1, 2, 3)


# -- parties ------------------------------------------------------------------------------------------------------


async def test_an_environment_is_registered_once_per_nonce(broker: Broker) -> None:
    first = await broker.parties.register_env(ENV, "one")
    assert (await broker.parties.register_env(ENV, "one")) == first
    second = await broker.parties.register_env(ENV, "two")
    assert [(env.env_id, env.name) for env in (first, second)] == [(0, "sums_0"), (1, "sums_1")]
    assert await broker.parties.envs() == [first, second]


async def test_a_note_is_set_even_when_redis_is_full(broker: Broker) -> None:
    for new in (1, 0):
        assert await broker.scripts.note(keys=[broker.keys.trainers], args=["started", "1"]) == new
    assert await broker.parties.started()


async def test_a_group_accepted_while_nobody_looked_ends_the_wait_at_once(broker: Broker) -> None:
    before = await broker.queue.newest_group()
    assert before == "0-0"
    await broker.queue.put("g1", group(1), v_min=0, v_max=0)
    with anyio.fail_after(5):
        await broker.queue.wait_for_group(60, after=before)
    assert await broker.queue.newest_group() != before

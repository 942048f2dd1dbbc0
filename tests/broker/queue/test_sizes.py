"""Twice as many values as Lua hands over at once, 8,000, in every script that takes a list; and lists in Python."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs
from queued import put
from replicas import founded, lent
from scored import group, trained

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.queue.blobs import SLICE_BYTES, SLICE_GROUPS
from lachesis.broker.records.blobs import queue_entry, to_blob
from lachesis.broker.records.entries import to_entry
from lachesis.broker.records.groups import Limits, Lineage, ScoredGroup
from lachesis.broker.records.packing import pack, to_arrays
from lachesis.broker.records.steps import Lease
from lachesis.broker.records.versions import WeightsEntry
from lachesis.broker.replicas.members import CONSUMER
from lachesis.broker.retention.dead_letters import untrainable
from lachesis.broker.run.lineage import from_record

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
MANY = 16_000
ONE = group(1, 1)
PACKED = pack(ONE)


async def fill(broker: Broker, count: int = MANY) -> None:
    """A queue of so many groups of one sequence, as PUT leaves it; the audits below compare every counter."""
    redis, keys, stored = broker.redis, broker.keys, 0
    arrays = to_arrays(ONE)
    for start in range(0, count, 1000):
        async with redis.pipeline(transaction=False) as pipe:
            for number in range(start, start + 1000):
                blob = to_blob(PACKED, f"g{number}", v_min=0, v_max=0)
                entry = queue_entry(structs.replace(arrays, gid=f"g{number}", v_min=0, v_max=0), len(blob))
                pipe.set(keys.blob(f"g{number}"), blob)
                pipe.xadd(keys.groups, to_entry(entry))
                stored += len(blob)
            await pipe.execute()
    counters = dict.fromkeys(("accepted", "groups", "sequences", "waiting:0:1", "env_sequences:0"), count)
    await redis.hset(keys.state, mapping={**counters, "bytes": stored, "env_bytes:0": stored})


async def leased(broker: Broker, policy: str = "main", consumer: str = "a", **more: int) -> Lease:
    lease = await broker.queue.lease_or_form(policy, consumer, MANY, lapse_s=600, **more)
    assert lease is not None
    assert len(lease.batch.gids) == MANY
    return lease


async def blobs(broker: Broker) -> int:
    return len(await broker.redis.keys(broker.keys.blob("*")))


async def test_a_batch_of_many_groups_is_formed_lent_read_committed_and_freed(broker: Broker) -> None:
    """FORM, LEASE, DELIVER, LENGTHS, COMMIT with a letter for each sequence, RETIRE."""
    await broker.queue.subscribe("main")
    await broker.queue.subscribe("late")
    await fill(broker)
    lease = await leased(broker)
    assert len(await broker.queue.blobs(lease.batch.gids)) == MANY
    letters = [untrainable(gid, 0, "") for gid in lease.batch.gids]
    await broker.queue.commit("main", lease, trained(lease.batch), untrainable=letters)
    assert (await broker.queue.status()).untrainable == MANY
    late = await broker.queue.lease("late", "b", lapse_s=600)
    assert late is not None
    await broker.queue.commit("late", late, trained(late.batch))
    assert await broker.queue.retire("main", 1) == 0
    assert await broker.queue.retire("late", 1) == 1
    assert await blobs(broker) == 0
    assert not await broker.redis.exists(broker.keys.trained)
    assert (await audit(broker)).findings == []


async def test_a_step_of_many_groups_is_trained_by_replicas(broker: Broker) -> None:
    """OPEN, CLAIM anew, CLAIM of a lost reply, CLAIM of what an evicted one had, EVICT, VOTE with a letter for each sequence."""
    await fill(broker)
    me = await founded(broker)
    step = await lent(broker, MANY)
    assert await broker.members.open_step(me, step)
    for _ in range(2):  # the second as if the first one's reply was lost
        claimed = await broker.members.claim(me, step, count=MANY, held=0)
        assert claimed is not None
        assert (len(claimed.groups), claimed.left) == (MANY, 0)
    other = await broker.members.join("main", "b", generation=me.generation, step=step - 1)
    assert other is not None
    limits = {f"nobody{number}": 0.0 for number in range(MANY)} | {"a": 0.0}
    assert await broker.members.evict("main", silent_s=600, limits=limits) == 1
    (alone,) = await broker.members.members("main")
    survivor = await broker.members.join("main", alone.id, generation=me.generation, step=step - 1)
    assert survivor is not None
    claimed = await broker.members.claim(survivor, step, count=MANY, held=0)
    assert claimed is not None
    assert (len(claimed.groups), claimed.left) == (MANY, 0)
    batch = await broker.queue.batch(step)
    assert batch is not None
    letters = [untrainable(gid, 0, "") for gid in batch.gids]
    assert await broker.members.vote(survivor, step, "digest", trained(batch, CONSUMER), untrainable=letters)
    assert await broker.queue.retire("main", step) == 1
    assert (await audit(broker)).findings == []


async def test_many_groups_become_dead_letters_at_once(broker: Broker) -> None:
    """DROP of all that is stale, RESET; LEASE that gives a batch up."""
    await broker.queue.subscribe("main")
    await fill(broker)
    await broker.weights.publish("main", WeightsEntry(9, 9, "file:///v", "0", 1, "BF16", -1))
    await broker.queue.put("young", ONE, v_min=9, v_max=9, limits=Limits(max_lag=1))
    assert await broker.queue.form(MANY) is None
    assert (await broker.queue.status()).dropped == {"stale": MANY}
    await broker.reset()

    await broker.queue.subscribe("main")
    await fill(broker)
    await leased(broker, max_deliveries=1)
    assert await broker.queue.lease("main", "a", lapse_s=600, max_deliveries=1) is None
    status = await broker.queue.status()
    assert (status.dropped, status.dead, status.groups) == ({"deliveries": MANY}, MANY, 0)
    assert len(await broker.dead.accepted()) == MANY


async def test_scripts_take_long_lists_of_anything(broker: Broker) -> None:
    """NOTE, LEAVE, RECORD, ARRIVE."""
    keys, scripts = broker.keys, broker.scripts
    pairs = [text for number in range(MANY) for text in (f"f{number}", "1")]
    for new in (MANY, 0):
        assert await scripts.set_fields(keys=[keys.state], args=pairs) == new
    await broker.queue.subscribe("reader")
    assert await broker.queue.retention.leave("reader", *pairs[::2])
    assert await broker.redis.hlen(keys.state) == 0

    lineage = Lineage(0, 1, ((0, 0, 1),))
    digests = [f"{number:032}" for number in range(MANY)]
    await broker.lineage.record([(digest, lineage) for digest in digests])
    named = [keys.trainers, keys.weights("main"), keys.pools, keys.lineage, keys.old_lineage, keys.served]
    *_, recorded, found, _ = await scripts.read_arrival(keys=named, args=[*digests, "none"])
    assert recorded == 1
    assert found[-1] is None
    assert {from_record(raw) for raw in found[:-1]} == {lineage}


async def test_a_lapsed_lease_is_found_behind_any_number_of_living_ones(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await put(broker, *range(45))
    leases = []
    for number in range(45):
        lease = await broker.queue.lease_or_form("main", f"c{number}", 2, lapse_s=600)
        assert lease is not None
        leases.append(lease)
    last = leases[-1].batch.step
    await broker.redis.xclaim(broker.keys.batches, "main", "c44", 0, [f"{last}-0"], idle=900_000, justid=True)
    found = await broker.queue.lease("main", "new", lapse_s=600)
    assert found is not None
    assert (found.batch.step, found.deliveries) == (last, 2)


async def test_blobs_are_fetched_by_what_each_holds(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones first, or last, or in between: no reply is larger than a slice."""
    rng, gids = np.random.default_rng(0), []
    large = SLICE_BYTES // 5
    for place in range(16):
        count = 4 if place % 8 == 0 else large // 4
        tokens = rng.integers(0, 2**31 - 1, count).tolist()
        await broker.queue.put(f"g{place}", ScoredGroup([tokens], [tokens], [1.0]), v_min=0, v_max=0)
        gids.append(f"g{place}")
    replies: list[int] = []
    mget = broker.redis.mget

    async def watched(keys: list[str]) -> list[bytes]:
        found: list[bytes] = await mget(keys)
        replies.append(sum(len(blob or b"") for blob in found))
        return found

    monkeypatch.setattr(broker.redis, "mget", watched)
    assert len(await broker.queue.blobs(gids)) == 16
    assert max(replies) <= SLICE_BYTES
    assert len(replies) <= 16 * large // SLICE_BYTES + 2
    assert await broker.queue.blobs([]) == []
    with pytest.raises(LookupError, match="group none has no blob"):
        await broker.queue.blobs([*gids[:2], "none"])


async def test_many_small_blobs_are_read_in_order(broker: Broker) -> None:
    count = 2 * SLICE_GROUPS + 1
    await broker.redis.mset({broker.keys.blob(f"g{number}"): str(number) for number in range(count)})
    assert await broker.queue.blobs([f"g{number}" for number in range(count)]) == [b"%d" % n for n in range(count)]


async def test_covered_never_goes_back(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    for step, covered in ((7, 7), (5, 7), (9, 9), (10, 10), (9, 10)):
        assert await broker.queue.retention.advance_checkpoint("main", step)
        assert await broker.queue.retention.readers() == {"main": covered}

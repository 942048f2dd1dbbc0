"""LEASE and COMMIT on a real Redis, called twice and by the wrong ones: a batch is trained once, whoever asks."""

from __future__ import annotations

import pytest
from msgspec import structs
from queued import dead, lease, put
from redis.exceptions import ResponseError
from scored import trained

from lachesis.broker import Broker, LeaseLost
from lachesis.broker.audit import audit
from lachesis.broker.errors import NotFound
from lachesis.broker.records.groups import RefusedEntry
from lachesis.broker.retention.dead_letters import untrainable

pytestmark = pytest.mark.anyio


# -- LEASE --------------------------------------------------------------------------------------------------------


async def test_a_lease_asked_for_twice_is_the_same_batch(broker: Broker) -> None:
    await put(broker, 1, 2, 3, 4)
    first, again = await lease(broker), await lease(broker)
    assert first.batch == again.batch
    assert (first.deliveries, again.deliveries) == (1, 2)
    status = await broker.queue.status()
    assert (status.formed, status.delivered, status.groups) == (1, 1, 2)


async def test_a_batch_lent_without_counting_stays_queued_until_it_is_delivered(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2, 3, 4)
    for _ in range(2):
        await broker.queue.form(4)
    first = await broker.queue.lease("main", "a", lapse_s=600, delivered=False)
    assert first is not None
    await broker.queue.commit("main", first, trained(first.batch))
    assert await broker.queue.retire("main", 1) == 0  # the counters still count it
    status = await broker.queue.status()
    assert (status.delivered, status.groups, status.sequences) == (0, 4, 8)
    assert (await audit(broker)).findings == []
    assert await broker.queue.deliver(1)
    assert not await broker.queue.deliver(1)
    assert not await broker.queue.deliver(9)  # never formed
    assert await broker.queue.retire("main", 1) == 1
    status = await broker.queue.status()
    assert (status.delivered, status.groups, status.sequences) == (1, 2, 4)
    second = await lease(broker)
    assert (second.batch.step, (await broker.queue.status()).groups) == (2, 0)


async def test_what_comes_next_is_told_without_lending_it(broker: Broker) -> None:
    upcoming = broker.queue.upcoming
    with pytest.raises(ResponseError, match="NOGROUP"):
        await upcoming("main", 0)
    await broker.queue.subscribe("main")
    await put(broker, *range(6))
    assert await upcoming("main", 0) is None
    for _ in range(3):
        await broker.queue.form(4)
    first, second = await upcoming("main", 0), await lease(broker)
    assert first == second.batch
    found = await upcoming("main", 1)
    assert found is not None
    assert found.step == 2
    assert await broker.queue.lease("main", "b", lapse_s=600) is not None
    for after, step in ((0, 1), (1, 2), (2, 3)):  # what is pending comes first
        found = await upcoming("main", after)
        assert found is not None
        assert found.step == step
    status = await broker.queue.status()
    assert (status.delivered, status.groups) == (2, 2)


async def test_only_a_lapsed_lease_goes_to_another_consumer(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker, "a")
    assert await broker.queue.lease("main", "b", lapse_s=600) is None
    assert await broker.queue.renew("main", held)
    taken = await broker.queue.lease("main", "b", lapse_s=0)
    assert taken is not None
    assert taken.batch == held.batch
    assert not await broker.queue.renew("main", held)  # a late heartbeat does not take the batch back
    assert await broker.queue.lease("main", "a", lapse_s=600) is None


async def test_sequences_that_a_step_is_trained_without_are_noted_once(broker: Broker) -> None:
    await put(broker, 1, 2)
    held = await lease(broker)
    letters = [
        untrainable("g1", 1, "token id 9: must be below 8"),
        untrainable("g/2", 0, "9 tokens: must not exceed 8"),
    ]
    for _ in range(2):  # the second changes nothing
        await broker.queue.commit("main", held, trained(held.batch), untrainable=letters)
    found = await broker.dead.all()
    assert [(letter.accepted, letter.sequence, letter.entry) for letter in found] == [
        (False, ("g1", 1), RefusedEntry(**structs.asdict(letters[0]))),
        (False, ("g/2", 0), RefusedEntry(**structs.asdict(letters[1]))),
    ]
    status = await broker.queue.status()
    assert (status.untrainable, status.dead) == (2, 0)
    assert await broker.dead.body(found[0]) == (await broker.queue.blobs(["g1"]))[0]
    report = await audit(broker)
    assert (report.findings, report.trained) == ([], 2)
    await broker.queue.retire("main", 1)
    with pytest.raises(NotFound, match="the data of 'g1' is gone: the group was trained"):
        await broker.dead.body(found[0])


async def test_each_policy_gets_every_batch(broker: Broker) -> None:
    await put(broker, 1, 2)
    await broker.queue.subscribe("shadow")
    await broker.queue.subscribe("shadow")
    main = await lease(broker)
    shadow = await broker.queue.lease("shadow", "s", lapse_s=600)
    assert shadow is not None
    assert shadow.batch == main.batch


async def test_a_batch_lent_too_often_is_given_up_with_its_groups(broker: Broker) -> None:
    await put(broker, 1, 2, 3, 4)
    first = await lease(broker)
    for deliveries in (2, 3):
        again = await broker.queue.lease("main", "b", lapse_s=0, max_deliveries=3)
        assert again is not None
        assert (again.batch, again.deliveries) == (first.batch, deliveries)
    found = await broker.queue.lease_or_form("main", "b", 4, lapse_s=0, max_deliveries=3)
    assert found is not None
    assert (found.batch.step, found.deliveries) == (2, 1)
    detail = "step 1 was lent 3 times and never committed"
    assert await dead(broker) == [("g1", "deliveries", 3, detail), ("g2", "deliveries", 3, detail)]
    assert await broker.queue.batch(1) is None
    with pytest.raises(LeaseLost, match="nobody holds it"):
        await broker.queue.commit("main", first, trained(first.batch))
    assert (await broker.queue.status()).dropped == {"deliveries": 2}
    await broker.queue.commit("main", found, trained(found.batch, "b"))
    assert await broker.queue.settled("main") == 2
    report = await audit(broker)
    assert report.findings == []
    assert (report.trained, report.dead, report.steps) == (2, 2, 1)


async def test_a_batch_that_another_policy_trains_is_only_skipped(broker: Broker) -> None:
    await put(broker, 1, 2)
    await broker.queue.subscribe("shadow")
    main = await lease(broker)
    for _ in range(3):
        await broker.queue.lease("shadow", "s", lapse_s=0, max_deliveries=2)
    assert await broker.queue.batch(1) == main.batch
    assert (await audit(broker, "shadow")).skipped == 2
    await broker.queue.commit("main", main, trained(main.batch))
    for policy in ("main", "shadow"):
        report = await audit(broker, policy)
        assert report.findings == []
        assert (report.dead, report.trained, report.skipped) == (0, *((2, 0) if policy == "main" else (0, 2)))
    assert [await broker.queue.retire(policy, 1) for policy in ("main", "shadow")] == [0, 1]
    assert (await audit(broker, "shadow")).findings == []


async def test_the_last_policy_to_give_a_batch_up_buries_it(broker: Broker) -> None:
    await put(broker, 1, 2)
    await lease(broker)
    await broker.queue.subscribe("shadow")
    for policy in ("shadow", "main"):
        assert await dead(broker) == []
        for _ in range(3):
            await broker.queue.lease(policy, "a", lapse_s=0, max_deliveries=2)
    assert [entry[:3] for entry in await dead(broker)] == [("g1", "deliveries", 2), ("g2", "deliveries", 2)]
    for policy in ("main", "shadow"):
        report = await audit(broker, policy)
        assert report.findings == []
        assert (report.dead, report.skipped) == (2, 0)


async def test_zero_deliveries_means_never(broker: Broker) -> None:
    await put(broker, 1, 2)
    await lease(broker)
    for _ in range(20):
        assert await broker.queue.lease("main", "a", lapse_s=600, max_deliveries=0)


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
    earlier, later = broker.registry.writer("main", ttl_s=60), broker.registry.writer("main", ttl_s=60)
    assert await earlier.acquire(blocking=False)
    assert not await later.acquire(blocking=False)
    old = earlier.local.token.decode()
    await broker.redis.delete(broker.keys.writer("main"))  # as if its time had run out
    assert await later.acquire(blocking=False)
    with pytest.raises(LeaseLost, match="another process writes"):
        await broker.queue.commit("main", held, trained(held.batch), token=old)
    await broker.queue.commit("main", held, trained(held.batch), token=later.local.token.decode())

"""Every script on a real Redis, each called twice: a client may send any of them again."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from redis.exceptions import ResponseError
from scored import group, trained

from lachesis.broker import Broker, LeaseLost
from lachesis.broker.audit import audit
from lachesis.broker.codec import to_entry
from lachesis.broker.dead import Letter, untrainable
from lachesis.broker.errors import NotFound
from lachesis.broker.packing import pack, to_blob
from lachesis.broker.queue import BLOB_TTL_S, SEEN_TTL_S
from lachesis.broker.records import BatchEntry, EnvConfig, Lease, Limits, TrainerConfig, WeightsEntry

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
    assert (before.accepted, before.groups, before.sequences, before.waiting) == (1, 1, 2, {"0": {2: 1}})


async def test_a_blob_loses_its_ttl_when_it_is_queued_and_not_before(broker: Broker) -> None:
    keys, blob = broker.keys, to_blob(pack(group(1)), "g1", v_min=0, v_max=0)
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
        keys=[
            keys.groups,
            keys.blob("g1"),
            keys.seen("g1"),
            keys.state,
            keys.trainers,
            keys.weights("main"),
            "p",
            "l",
            "o",
        ],
        args=[60, 0, 0, 0, 0, "", "main", 0, "", "", "0", 2, 100, "gid", "g1"],
    )
    assert reply == b"noblob"
    assert not await broker.redis.exists(keys.groups, keys.seen("g1"), keys.state)


@pytest.mark.parametrize(
    ("limits", "reply"),
    [
        (Limits(bytes=1), "full"),
        (Limits(sequences=1), "full"),
        (Limits(env_bytes=1), "env_full"),
        (Limits(env_sequences=1), "env_full"),
    ],
)
async def test_a_quota_refuses_what_does_not_fit_but_never_the_only_group(
    broker: Broker, limits: Limits, reply: str
) -> None:
    assert await broker.queue.put("g1", group(1), v_min=0, v_max=0, limits=limits) == "stored"
    assert await broker.queue.put("g2", group(2), v_min=0, v_max=0, limits=limits) == reply
    other = await broker.queue.put("g3", group(3, env_id=1), v_min=0, v_max=0, limits=limits)
    assert other == ("stored" if reply == "env_full" else "full")
    assert (await broker.queue.status()).accepted == (2 if reply == "env_full" else 1)
    assert await broker.redis.ttl(broker.keys.blob("g2")) > 0


async def test_a_group_waits_while_max_lag_batches_are_queued_or_undelivered(broker: Broker) -> None:
    limits = Limits(max_lag=1)
    await broker.queue.subscribe("main")

    async def reply(number: int) -> str:
        return await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0, limits=limits)

    assert [await reply(number) for number in range(3)] == ["stored"] * 3  # nobody has registered: no batch size
    await broker.parties.register_trainer(TrainerConfig("g", "p", 4, 16, "", 1, 0, 1))
    assert await reply(3) == "late"
    assert await broker.queue.form(4) == 1
    assert await reply(3) == "late"  # 2 sequences are queued, and 4 in a batch that nobody has
    assert await broker.queue.lease("main", "a", lapse_s=600)
    assert await reply(3) == "stored"
    assert await reply(4) == "late"


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
    assert await form(broker, 1, 4, ids[:2]) == b"formed"  # the same call, sent again
    for step, total, chosen in ((1, 2, ids[:1]), (2, 4, ids[1:]), (2, 4, ids[2:]), (3, 2, ids[2:])):
        assert await form(broker, step, total, chosen) == b"conflict"
    assert await snapshot(broker) == after
    status = await broker.queue.status()
    assert (status.formed, status.delivered) == (1, 0)
    assert (status.groups, status.sequences) == (3, 6)  # a formed batch counts until it is delivered
    assert status.waiting == {"0": {2: 1}}


# -- DROP ---------------------------------------------------------------------------------------------------------


async def dead(broker: Broker) -> list[tuple[str, str, int, str]]:
    letters = [letter.entry for letter in await broker.dead.accepted()]
    return [(entry.gid, entry.reason, entry.deliveries, entry.detail) for entry in letters]


async def test_what_is_too_stale_is_dropped_once_and_never_batched(broker: Broker) -> None:
    for number, v_min in ((1, 0), (2, 3), (3, 4), (4, 9)):
        await broker.queue.put(f"g{number}", group(number), v_min=v_min, v_max=9, limits=Limits(max_lag=5))
    await broker.weights.publish("shadow", WeightsEntry(99, 99, "file:///v", "0", 1, "BF16", -1))
    await broker.weights.publish("main", WeightsEntry(9, 9, "file:///v", "0", 1, "BF16", -1))
    queued = [(id_, entry.v_min) for id_, entry in await broker.queue.queued()]
    assert await broker.queue.form(4) == 1
    batch = await broker.queue.batch(1)
    assert batch is not None
    assert batch.gids == ("g3", "g4")
    detail = "its oldest tokens are of version {}, the newest version is 9, and max_lag is 5"
    assert await dead(broker) == [(f"g{n}", "stale", 0, detail.format(v)) for n, v in ((1, 0), (2, 3))]
    keys = broker.keys
    ids = [id_ for id_, _ in queued]
    assert await broker.scripts.drop(keys=[keys.groups, keys.dead, keys.state], args=[9, 5, *ids]) == 0
    status = await broker.queue.status()
    assert (status.dead, status.dropped, status.waiting, status.bytes) == (2, {"stale": 2}, {}, 0)
    assert (await audit(broker)).findings == []


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
        (False, ("g1", 1), letters[0]),
        (False, ("g/2", 0), letters[1]),
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


# -- REQUEUE, PURGE, BURY -----------------------------------------------------------------------------------------


async def a_dead_letter(broker: Broker) -> Letter:
    """g1 (of g1 and g2) of a batch that was lent too often."""
    await put(broker, 1, 2)
    for _ in range(2):
        await broker.queue.subscribe("main")
        await broker.queue.lease_or_form("main", "a", 4, lapse_s=0, max_deliveries=1)
    return (await broker.dead.accepted())[0]


async def test_a_requeued_group_is_at_the_end_of_the_queue_as_it_was_and_counts_anew(broker: Broker) -> None:
    await put(broker, 1, 2)
    before = [entry for _, entry in await broker.queue.queued()]
    await lease(broker)
    assert await broker.queue.lease("main", "a", lapse_s=0, max_deliveries=1) is None
    await put(broker, 3)
    for letter in await broker.dead.find(["g1", "g2"]):
        (kept,) = await broker.queue.fetch([letter.entry.gid])
        stored = len(await broker.dead.body(letter))
        assert [await broker.dead.requeue(letter, kept, stored) for _ in range(2)] == [True, False]
    assert [entry for _, entry in await broker.queue.queued()][1:] == before
    assert await broker.dead.accepted() == []
    assert (await audit(broker)).findings == []
    again = await lease(broker)
    assert (again.batch.step, again.batch.gids, again.deliveries) == (2, ("g3", "g1"), 1)
    assert (await audit(broker)).findings == []


async def test_a_group_is_not_requeued_without_its_data(broker: Broker) -> None:
    letter = await a_dead_letter(broker)
    (kept,) = await broker.queue.fetch(["g1"])
    await broker.redis.delete(broker.keys.blob("g1"))
    assert not await broker.dead.requeue(letter, kept, 1)
    assert letter in await broker.dead.accepted()
    assert (await audit(broker)).findings == ["groups waiting without their data: g1"]


async def test_what_is_purged_is_freed_counted_and_logged_once(broker: Broker) -> None:
    letter = await a_dead_letter(broker)
    assert [await broker.dead.purge(letter, who="me") for _ in range(2)] == [True, False]
    assert not await broker.redis.exists(broker.keys.blob("g1"))
    (logged,) = await broker.redis.xrange(broker.keys.control)
    assert logged[1][b"detail"] == b"g1 (deliveries): step 1 was lent 1 times and never committed"
    report = await audit(broker)
    assert report.findings == []
    assert (report.accepted, report.dead, report.purged) == (2, 1, 1)
    assert await broker.queue.put("g1", group(1), v_min=0, v_max=0) == "duplicate"


async def test_a_refused_post_is_kept_once_and_never_counted(broker: Broker) -> None:
    for _ in range(2):
        await broker.queue.bury("refused-x", b"body", "invalid", "why")
    (letter,) = await broker.dead.all()
    assert (letter.accepted, letter.entry.detail, await broker.dead.body(letter)) == (False, "why", b"body")
    assert 0 < await broker.redis.ttl(broker.keys.blob("refused-x")) <= 7 * 24 * 3600
    assert await broker.dead.purge(letter, who="me")
    assert (await broker.queue.status()).purged == 0
    with pytest.raises(NotFound, match="'refused-x' is no dead letter of run"):
        await broker.dead.find(["refused-x"])


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


async def test_reset_forgets_dead_letters_of_accepted_groups(broker: Broker) -> None:
    await a_dead_letter(broker)
    await broker.queue.bury("refused-x", b"body", "invalid", "why")
    await broker.reset()
    assert [letter.entry.gid for letter in await broker.dead.all()] == ["refused-x"]
    await put(broker, 1, 2)
    assert (await audit(broker)).findings == []


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

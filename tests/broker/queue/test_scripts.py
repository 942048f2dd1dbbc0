"""Every script on a real Redis, each called twice: a client may send any of them again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from msgspec import structs
from queued import ENV, dead, lease, put
from replicas import founded
from scored import group, trained

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.errors import NotFound
from lachesis.broker.queue.put import BLOB_TTL_S
from lachesis.broker.records.blobs import to_blob
from lachesis.broker.records.entries import to_entry
from lachesis.broker.records.groups import DUPLICATE_WINDOW_S, Limits
from lachesis.broker.records.packing import pack
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.steps import BatchEntry
from lachesis.broker.records.versions import WeightsEntry
from lachesis.broker.retention.dead_letters import Letter
from lachesis.broker.run.journal import KEEP_EVENTS

pytestmark = pytest.mark.anyio


# -- PUT ----------------------------------------------------------------------------------------------------------


async def test_put_twice_stores_once(broker: Broker) -> None:
    await put(broker, 1)
    before = await broker.queue.status()
    assert await broker.queue.put("g1", group(1), v_min=0, v_max=0) == "duplicate"
    after = await broker.queue.status()
    assert (before.duplicates, after.duplicates) == ({}, {"0": 1})
    assert structs.replace(after, duplicates={}) == before
    assert (before.accepted, before.groups, before.sequences, before.waiting) == (1, 1, 2, {"0": {2: 1}})


async def test_a_blob_loses_its_ttl_when_it_is_queued_and_not_before(broker: Broker) -> None:
    keys, blob = broker.keys, to_blob(pack(group(1)), "g1", v_min=0, v_max=0)
    await broker.redis.set(keys.blob("g1"), blob, ex=BLOB_TTL_S)  # as a shim that dies before PUT leaves it
    assert 0 < await broker.redis.ttl(keys.blob("g1")) <= BLOB_TTL_S
    await put(broker, 1)
    assert await broker.redis.ttl(keys.blob("g1")) == -1
    assert 0 < await broker.redis.ttl(keys.seen("g1")) <= DUPLICATE_WINDOW_S


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
            "p",
            "l",
            "o",
            keys.trained,
        ],
        args=[60, "w", "", "g1", 0, 0, 0, 0, "", "main", 0, "", "", "0", 2, 100, 1, "gid", "g1"],
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
    await broker.registry.register_trainer(TrainerConfig("g", "p", 4, 16, "", 1, 0, 1))
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
        keys=[keys.groups, keys.batches, keys.state, keys.settings], args=[step, total, len(ids), *ids, *fields]
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


async def test_whatever_writes_to_the_log_of_events_keeps_as_many(broker: Broker) -> None:
    node = 100  # entries by which a stream is trimmed
    more = KEEP_EVENTS + 3 * node
    fill = f"for _ = redis.call('XLEN', KEYS[1]), {more} do redis.call('XADD', KEYS[1], '*', 'event', 'x') end"
    letter = await a_dead_letter(broker)
    acts: dict[str, Callable[[], Awaitable[object]]] = {
        "purge": lambda: broker.dead.purge(letter, who="me"),
        "founded": lambda: founded(broker),
        "joined": lambda: broker.members.join("main", "b", generation=1, step=0),
        "evicted": lambda: broker.members.evict("main", silent_s=60, limits={"b": 0}),
        "reset": lambda: broker.journal.control("reset", "me"),
    }
    for event, act in acts.items():
        await broker.redis.eval(fill, 1, broker.keys.control)
        await act()
        _, ((_, fields),) = await broker.journal.newest_events(1)
        assert fields["event"] == event
        assert KEEP_EVENTS <= await broker.redis.xlen(broker.keys.control) <= KEEP_EVENTS + node


async def test_a_refused_post_is_kept_once_and_never_counted(broker: Broker) -> None:
    for _ in range(2):
        await broker.queue.keep_refused("refused-x", b"body", "invalid", "why")
    (letter,) = await broker.dead.all()
    assert (letter.accepted, letter.entry.detail, await broker.dead.body(letter)) == (False, "why", b"body")
    assert 0 < await broker.redis.ttl(broker.keys.blob("refused-x")) <= 7 * 24 * 3600
    assert await broker.dead.purge(letter, who="me")
    assert (await broker.queue.status()).purged == 0
    with pytest.raises(NotFound, match="'refused-x' is no dead letter of run"):
        await broker.dead.find(["refused-x"])


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
    await broker.queue.keep_refused("refused-x", b"body", "invalid", "why")
    await broker.reset()
    assert [letter.entry.gid for letter in await broker.dead.all()] == ["refused-x"]
    await put(broker, 1, 2)
    assert (await audit(broker)).findings == []


async def test_a_group_put_while_the_run_is_reset_is_in_or_out(broker: Broker) -> None:
    """One script forgets all of it: each group is either gone with its marks, or queued with its data."""
    await put(broker, *range(60))
    await lease(broker)

    async def put_more() -> None:
        for number in range(100, 160):
            await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0)

    async with anyio.create_task_group() as tasks:
        for act in (put_more, broker.reset, put_more, broker.reset, put_more):
            tasks.start_soon(act)
    kept = {entry.gid for _, entry in await broker.queue.queued()}
    for number in (*range(60), *range(100, 160)):
        gid = f"g{number}"
        marks = await broker.redis.exists(broker.keys.blob(gid), broker.keys.seen(gid))
        assert marks == (2 if gid in kept else 0), gid
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
    first = await broker.registry.register_env(ENV, "one")
    assert (await broker.registry.register_env(ENV, "one")) == first
    second = await broker.registry.register_env(ENV, "two")
    assert [(env.env_id, env.name) for env in (first, second)] == [(0, "sums_0"), (1, "sums_1")]
    assert await broker.registry.envs() == [first, second]


async def test_a_note_is_set_even_when_redis_is_full(broker: Broker) -> None:
    for new in (1, 0):
        assert await broker.scripts.set_fields(keys=[broker.keys.trainers], args=["started", "1"]) == new
    assert await broker.registry.started()


async def test_a_group_accepted_while_nobody_looked_ends_the_wait_at_once(broker: Broker) -> None:
    before = await broker.queue.newest_group()
    assert before == "0-0"
    await broker.queue.put("g1", group(1), v_min=0, v_max=0)
    with anyio.fail_after(5):
        await broker.queue.wait_for_group(60, after=before)
    assert await broker.queue.newest_group() != before

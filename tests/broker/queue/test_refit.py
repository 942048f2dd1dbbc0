"""New settings on an old queue, and what is gone from it: nothing waits for ever, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest
from queued import dead, put
from scored import group, trained

from lachesis.broker import Broker, EmbeddedRedis, LeaseLost
from lachesis.broker.audit import audit
from lachesis.broker.queue.counters import makes_batch
from lachesis.broker.records.blobs import queue_entry, to_blob
from lachesis.broker.records.entries import flat_entry
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.packing import pack, to_arrays
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.retention.shadows import Rule

pytestmark = pytest.mark.anyio


def config(batch_size: int, max_token_len: int = 100) -> TrainerConfig:
    return TrainerConfig("g", "p", batch_size, max_token_len, "", 1, 0, 100)


async def registered(broker: Broker, batch_size: int, max_token_len: int = 100) -> None:
    await broker.registry.register_trainer(config(batch_size, max_token_len))
    await broker.queue.refit.if_due("main")


async def queued(broker: Broker) -> list[str]:
    return [entry.gid for _, entry in await broker.queue.queued()]


def long(number: int, length: int) -> ScoredGroup:
    row = [number, *range(length - 1)]
    return ScoredGroup(tokens=[row, row[:2]], masks=[row, row[:2]], scores=[0.0, 1.0], env_id=0)


# -- new settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lent", [False, True], ids=["nobody has it", "a trainer that is gone has it"])
@pytest.mark.parametrize("batch_size", [2, 6])
async def test_a_batch_of_another_size_goes_back_to_the_front_of_the_queue(
    broker: Broker, batch_size: int, lent: bool
) -> None:
    await broker.queue.subscribe("main")
    await registered(broker, 4)
    await put(broker, 1, 2, 3, 4)
    assert await broker.queue.form(4) == 1
    if lent:
        assert await broker.queue.lease("main", "old", lapse_s=600)
    await registered(broker, batch_size)
    assert await queued(broker) == ["g1", "g2", "g3", "g4"]
    status = await broker.queue.status()
    assert (status.groups, status.sequences, status.delivered) == (4, 8, 1)
    lease = await broker.queue.lease_or_form("main", "new", batch_size, lapse_s=600)
    assert lease is not None
    assert (lease.batch.step, lease.batch.gids) == (2, ("g1", "g2", "g3")[: batch_size // 2])
    assert (await audit(broker)).findings == []
    await broker.queue.commit("main", lease, trained(lease.batch))
    await broker.queue.retire("main", 2)
    assert (await audit(broker)).findings == []


async def test_who_had_the_batch_can_not_commit_it_any_more(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2)
    old = await broker.queue.lease_or_form("main", "old", 4, lapse_s=600)
    assert old is not None
    await registered(broker, 2)
    with pytest.raises(LeaseLost, match="step 1 of policy 'main' can't be committed"):
        await broker.queue.commit("main", old, trained(old.batch))
    assert (await audit(broker)).findings == []


async def test_groups_that_no_longer_fit_become_dead_letters_with_the_reason(broker: Broker) -> None:
    await registered(broker, 8, 100)
    await put(broker, 1, size=2)
    await put(broker, 2, 3, size=8)
    await broker.queue.put("g4", long(4, 40), v_min=0, v_max=0)
    await registered(broker, 4, 32)
    assert await queued(broker) == ["g1"]
    assert await dead(broker) == [
        ("g2", "oversized", 0, "8 sequences, and batch_size is 4"),
        ("g3", "oversized", 0, "8 sequences, and batch_size is 4"),
        ("g4", "oversized", 0, "a sequence of 40 tokens, and max_token_len is 32"),
    ]
    status = await broker.queue.status()
    assert (status.groups, status.sequences, status.waiting) == (1, 2, {"0": {2: 1}})
    assert status.dropped == {"oversized": 3}
    assert (await audit(broker)).findings == []


async def test_groups_of_a_batch_that_no_longer_fit_leave_it_and_the_others_are_queued(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await registered(broker, 4, 100)
    await broker.queue.put("g1", long(1, 40), v_min=0, v_max=0)
    await put(broker, 2)
    assert await broker.queue.form(4) == 1
    await registered(broker, 4, 32)
    assert await queued(broker) == ["g2"]
    assert [letter[:2] for letter in await dead(broker)] == [("g1", "oversized")]
    assert (await audit(broker)).findings == []


async def test_a_length_that_the_entry_does_not_tell_is_read_from_the_group(broker: Broker) -> None:
    """As entries of earlier releases."""
    await registered(broker, 4, 100)
    for number, length in ((1, 40), (2, 20)):
        await broker.queue.put(f"g{number}", long(number, length), v_min=0, v_max=0)
    for id_, fields in await broker.redis.xrange(broker.keys.groups):
        await broker.redis.xdel(broker.keys.groups, id_)
        await broker.redis.xadd(broker.keys.groups, {k: v for k, v in fields.items() if k != b"longest"})
    await registered(broker, 4, 21)
    assert await queued(broker) == ["g2"]


async def test_a_post_judged_by_the_settings_before_counts_for_nobody_for_long(broker: Broker) -> None:
    await registered(broker, 4, 32)
    await put(broker, 1, size=8)
    await broker.queue.put("g2", long(2, 40), v_min=0, v_max=0)
    await put(broker, 3, 4)
    assert await broker.queue.form(4) == 1
    batch = await broker.queue.batch(1)
    assert batch is not None
    assert batch.gids == ("g3", "g4")
    assert [letter[:2] for letter in await dead(broker)] == [("g1", "oversized"), ("g2", "oversized")]


async def test_a_batch_that_a_shadow_has_trained_is_skipped_and_one_it_only_has_is_taken_back(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await broker.queue.subscribe("shadow", Rule("lossless", 8))
    await registered(broker, 4)
    await put(broker, 1, 2, 3, 4, 5)
    for _ in range(2):
        assert await broker.queue.form(4)
    held = await broker.queue.lease("shadow", "s", lapse_s=600)
    assert held is not None
    await broker.queue.commit("shadow", held, trained(held.batch))
    lost = await broker.queue.lease("shadow", "s", lapse_s=600)
    assert lost is not None
    await registered(broker, 2)
    with pytest.raises(LeaseLost):
        await broker.queue.commit("shadow", lost, trained(lost.batch))
    for policy, gids in (("main", "g3"), ("shadow", "g3"), ("main", "g4")):
        lease = await broker.queue.lease_or_form(policy, "new", 2, lapse_s=600)
        assert lease is not None
        assert lease.batch.gids == (gids,)
        await broker.queue.commit(policy, lease, trained(lease.batch))
    for policy in ("main", "shadow"):
        assert (await audit(broker, policy)).findings == []


async def test_a_shadow_goes_on_with_old_batches_that_the_main_policy_has_trained(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await broker.queue.subscribe("shadow", Rule("lossless", 8))
    await registered(broker, 4)
    await put(broker, 1, 2)
    lease = await broker.queue.lease_or_form("main", "m", 4, lapse_s=600)
    assert lease is not None
    await broker.queue.commit("main", lease, trained(lease.batch))
    await registered(broker, 2)
    shadows = await broker.queue.lease("shadow", "s", lapse_s=600)
    assert shadows is not None
    assert shadows.batch == lease.batch


async def test_current_step_does_not_count_what_nobody_was_given(broker: Broker) -> None:
    from lachesis.shim.routes.status import current_step

    await broker.queue.subscribe("main")
    await registered(broker, 4)
    await put(broker, 1, 2)
    assert await broker.queue.form(4) == 1
    await registered(broker, 2)
    assert await current_step(broker) == 0
    assert await broker.queue.lease_or_form("main", "new", 2, lapse_s=600)
    assert await current_step(broker) == 1


async def test_many_groups_are_moved_at_once(broker: Broker) -> None:
    """Twice as many as Lua hands over at once."""
    count, blob = 16_000, to_blob(pack(group(1, 1)), "", v_min=0, v_max=0)
    entry = flat_entry(queue_entry(to_arrays(group(1, 1)), len(blob)))[2:]  # all but the id
    await broker.queue.subscribe("main")
    await registered(broker, count)
    async with broker.redis.pipeline(transaction=False) as pipe:  # as PUT leaves them
        for number in range(count):
            pipe.set(broker.keys.blob(f"g{number}"), blob)
            pipe.execute_command("XADD", broker.keys.groups, "*", "gid", f"g{number}", *entry)
        await pipe.execute()
    await broker.queue.refit("main")  # which counts them
    assert await broker.queue.form(count) == 1
    await registered(broker, count // 2)
    assert await broker.redis.xlen(broker.keys.groups) == count
    assert (await broker.queue.status()).groups == count


FITTER = """
import asyncio, sys
from lachesis.broker import Broker
async def main(url, run):
    broker = await Broker.connect(url, run)
    await broker.queue.refit.if_due("main")
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("point", ["refitting", "refitted"])
async def test_who_is_killed_around_it_leaves_all_or_nothing_to_the_next(
    broker: Broker, shared_redis: EmbeddedRedis, run_name: str, point: str
) -> None:
    await broker.queue.subscribe("main")
    await registered(broker, 4)
    await put(broker, 1, 2, 3)
    await put(broker, 4, size=3)
    assert await broker.queue.form(4) == 1
    await broker.registry.register_trainer(config(2))
    command = [sys.executable, "-c", FITTER, shared_redis.url, run_name]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, "LACHESIS_CRASH_AT": f"{point}:0"})
    assert await process.wait() == -signal.SIGKILL
    assert await queued(broker) == (["g3", "g4"] if point == "refitting" else ["g1", "g2", "g3"])
    assert (await audit(broker)).findings == []
    assert await broker.queue.form(2) == 2  # any replica goes on
    assert await queued(broker) == ["g2", "g3"]
    assert (await audit(broker)).findings == []


# -- gaps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consumer", ["a", "other"])
async def test_a_lent_batch_that_was_deleted_is_passed_over_and_the_next_one_lent(
    broker: Broker, consumer: str
) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2, 3, 4, 5)
    for _ in range(2):
        assert await broker.queue.form(4)
    assert await broker.queue.lease("main", "a", lapse_s=600)
    await broker.redis.xdel(broker.keys.batches, "1-0")
    lease = await broker.queue.lease("main", consumer, lapse_s=0)
    assert lease is not None
    assert lease.batch.step == 2
    assert await broker.redis.hget(broker.keys.state, "gone") == b"1"
    await broker.queue.commit("main", lease, trained(lease.batch))
    assert await broker.queue.settled("main") == 2


async def test_batches_deleted_before_anybody_read_them_do_not_count_as_queued_for_ever(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await put(broker, *range(1, 7))
    for _ in range(3):
        assert await broker.queue.form(4)
    await broker.redis.xtrim(broker.keys.batches, maxlen=0, approximate=False)
    for _ in range(2):
        assert await broker.queue.lease_or_form("main", "a", 4, lapse_s=600) is None
    assert await broker.redis.hget(broker.keys.state, "gone") == b"3"
    status = await broker.queue.status()
    assert (status.groups, status.sequences, status.formed, status.delivered) == (0, 0, 3, 3)
    assert not makes_batch(status, 4)
    await put(broker, 8, 9)
    lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert lease is not None
    assert lease.batch.step == 4


@pytest.mark.parametrize("how", ["XDEL", "XTRIM", "DEL"])
async def test_queued_groups_that_were_deleted_do_not_count_for_ever(broker: Broker, how: str) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2, 3)
    first = (await broker.queue.queued())[0][0]
    arguments = {"XDEL": (first,), "XTRIM": ("MAXLEN", 2), "DEL": ()}[how]
    await broker.redis.execute_command(how, broker.keys.groups, *arguments)
    assert await broker.queue.form(6) is None
    left = 0 if how == "DEL" else 2
    status = await broker.queue.status()
    assert (status.groups, status.sequences) == (left, 2 * left)
    await put(broker, *range(4, 7))
    lease = await broker.queue.lease_or_form("main", "a", 6, lapse_s=600)
    assert lease is not None
    assert len(lease.batch.gids) == 3


@pytest.mark.parametrize("blob", [None, b"not a group"], ids=["gone", "spoilt"])
async def test_a_batch_with_a_group_that_can_not_be_read_is_taken_apart(broker: Broker, blob: bytes | None) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2, 3)
    assert await broker.queue.form(4) == 1
    key = broker.keys.blob("g1")
    await (broker.redis.delete(key) if blob is None else broker.redis.set(key, blob))
    await broker.queue.refit("main", apart=[1])
    assert await queued(broker) == ["g2", "g3"]
    reason = "lost" if blob is None else "unreadable"
    assert [letter[:2] for letter in await dead(broker)] == [("g1", reason)]
    assert len((await audit(broker)).findings) == (blob is None)  # its data is missing
    lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert lease is not None
    assert lease.batch.gids == ("g2", "g3")


# -- who may commit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["in order", "out of order"])
async def test_a_stale_consumer_hears_that_its_lease_is_lost(broker: Broker, late: bool) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2, 3, 4)
    stale = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert stale is not None
    if late:
        next_ = await broker.queue.lease_or_form("main", "c", 4, lapse_s=600)
        assert next_ is not None
        await broker.queue.commit("main", next_, trained(next_.batch))
    taken = await broker.queue.lease("main", "b", lapse_s=0)
    assert taken is not None
    assert taken.batch.step == 1
    for _ in range(2):
        await broker.queue.commit("main", taken, trained(taken.batch))  # repeating it changes nothing
    with pytest.raises(LeaseLost, match="another consumer took it"):
        await broker.queue.commit("main", stale, trained(stale.batch))


async def test_a_step_in_the_ledger_of_an_earlier_release_is_its_replicas(broker: Broker) -> None:
    """It did not note the consumer, but the replica's name was the same."""
    await broker.queue.subscribe("main")
    await put(broker, 1, 2)
    lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert lease is not None
    await broker.queue.commit("main", lease, trained(lease.batch, "a"))
    [(id_, fields)] = await broker.redis.xrange(broker.keys.ledger("main"))
    del fields[b"consumer"]
    await broker.redis.delete(broker.keys.ledger("main"))
    await broker.redis.xadd(broker.keys.ledger("main"), fields, id=id_)
    await broker.queue.commit("main", lease, trained(lease.batch, "a"))
    assert isinstance(await broker.queue.newest_committed("main"), LedgerEntry)
    with pytest.raises(LeaseLost):
        await broker.queue.commit("main", type(lease)(lease.batch, "b", 1), trained(lease.batch, "b"))

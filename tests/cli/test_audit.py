"""The audit must see what is wrong: each guarantee is broken by hand, once."""

from __future__ import annotations

import pytest
from msgspec import structs

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.records.entries import id_number, to_entry
from lachesis.broker.records.groups import DeadEntry, ScoredGroup
from lachesis.broker.records.steps import LedgerEntry
from lachesis.cli.commands.audit import render

pytestmark = pytest.mark.anyio


def group(number: int) -> ScoredGroup:
    return ScoredGroup(tokens=[[1, 2], [1, number]], masks=[[-100, 2], [-100, number]], scores=[0.0, 1.0])


def trained(step: int, gids: tuple[str, ...]) -> LedgerEntry:
    return LedgerEntry(
        step=step, gids=gids, n=4, tok=8, v_before=step - 1, v_after=step, v_min=step - 1, lag=0, replica="r", reward=0.5,
        loss=0.0, seconds=1.0,
    )  # fmt: skip


@pytest.fixture
async def run(broker: Broker) -> Broker:
    """Five groups: two trained in step 1, two in the open batch of step 2, one queued."""
    await broker.queue.subscribe("main")
    for number in range(5):
        assert await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0) == "stored"
    lease = await broker.queue.lease_or_form("main", "r", 4, lapse_s=60)
    assert lease is not None
    await broker.queue.commit("main", lease, trained(1, lease.batch.gids))
    assert await broker.queue.lease_or_form("main", "r", 4, lapse_s=60)
    return broker


async def test_a_sound_run_is_clean(run: Broker) -> None:
    report = await audit(run)
    assert report.clean, report.findings
    assert (report.accepted, report.trained, report.open, report.queued, report.steps) == (5, 2, 2, 1, 1)


async def test_it_stays_clean_when_trained_batches_are_freed(run: Broker) -> None:
    assert await run.queue.retire("main", 1) == 1
    assert (await audit(run)).clean


async def test_a_lost_group_is_found(run: Broker) -> None:
    await run.redis.delete(run.keys.groups)
    assert "5 groups were accepted, 4 are accounted for" in (await audit(run)).findings


async def test_a_lost_blob_is_found(run: Broker) -> None:
    await run.redis.delete(run.keys.blob("g4"))
    assert (await audit(run)).findings == ["groups waiting without their data: g4"]


async def test_a_counter_that_is_wrong_is_found(run: Broker) -> None:
    await run.redis.hincrby(run.keys.state, "sequences", 1)
    await run.redis.hincrby(run.keys.state, "waiting:-:2", 1)
    assert (await audit(run)).findings == [
        "counters that contradict the queue: sequences 3, recounted 2, waiting {'-': {2: 2}}, recounted {'-': Counter({2: 1})}"
    ]


async def test_a_group_trained_twice_is_found(run: Broker) -> None:
    await run.redis.xadd(run.keys.ledger("main"), to_entry(trained(2, ("g0", "g3"))), id="2-0")
    findings = (await audit(run)).findings
    assert "groups in more than one place: g0" in findings
    assert "step 2 was committed with other groups than its batch holds" in findings


async def train_again(broker: Broker) -> None:
    """Groups of step 1, freed, are posted again; then all but one of those that wait are trained and freed."""
    assert await broker.queue.retire("main", 1) == 1
    await broker.redis.delete(*(broker.keys.seen(f"g{number}") for number in (0, 1)))
    for number in (0, 1):
        assert await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0) == "stored"
    while lease := await broker.queue.lease_or_form("main", "r", 4, lapse_s=60):
        await broker.queue.commit("main", lease, trained(lease.batch.step, lease.batch.gids))
        assert await broker.queue.retire("main", lease.batch.step) == 1
    report = await audit(broker)
    assert report.clean, report.findings
    assert report.queued == 1


async def train_one_twice(broker: Broker) -> None:
    """As if the newest step, whose batch is freed, had trained its second group twice, and not the first."""
    *before, newest = [entry async for entry in broker.queue.ledger("main")]
    ledger = broker.keys.ledger("main")
    await broker.redis.delete(ledger)
    for entry in (*before, structs.replace(newest, gids=(newest.gids[1], newest.gids[1]))):
        await broker.redis.xadd(ledger, to_entry(entry), id=f"{entry.step}-0")


@pytest.mark.parametrize("purged", [False, True])
async def test_an_id_that_came_again_and_was_trained_too_often_is_found(run: Broker, purged: bool) -> None:
    if purged:
        assert await run.queue.lease("main", "r", lapse_s=0, max_deliveries=1) is None
        for letter in await run.dead.accepted():
            assert await run.dead.purge(letter, who="a test")
    await train_again(run)
    await train_one_twice(run)
    assert (await audit(run)).findings == [
        "the groups accounted for are not those accepted: some are there too often, and as many not at all"
    ]


async def test_a_run_that_an_earlier_release_accepted_groups_for_is_judged_by_their_number(run: Broker) -> None:
    """It did not add up ids."""
    await run.redis.hincrby(run.keys.state, "ids", -id_number("g0"))
    await train_again(run)
    await train_one_twice(run)
    assert (await audit(run)).clean


async def test_a_step_committed_twice_is_found(run: Broker) -> None:
    await run.redis.xadd(run.keys.ledger("main"), to_entry(trained(1, ("g0", "g1"))), id="1-1")
    assert "steps committed more than once: 1" in (await audit(run)).findings


async def test_a_group_in_the_queue_and_in_a_batch_is_found(run: Broker) -> None:
    batch = await run.queue.batch(2)
    assert batch is not None
    (_, entry), *_ = await run.queue.queued()
    await run.redis.xadd(run.keys.groups, to_entry(structs.replace(entry, gid=batch.gids[0])))
    findings = (await audit(run)).findings
    assert f"groups in more than one place: {batch.gids[0]}" in findings
    assert any(
        finding.startswith("counters that contradict the queue: ") and "bytes" in finding for finding in findings
    )


async def test_a_dead_letter_that_was_trained_is_found(run: Broker) -> None:
    await run.redis.xadd(run.keys.dead, to_entry(DeadEntry("g0", "stale", 0, "")))
    findings = (await audit(run)).findings
    assert "groups in more than one place: g0" in findings
    assert "counters that contradict the queue: dead 0, recounted 1" in findings


async def test_a_lost_dead_letter_is_found(run: Broker) -> None:
    assert await run.queue.lease("main", "r", lapse_s=0, max_deliveries=1) is None
    report = await audit(run)
    assert report.clean, report.findings
    assert (report.open, report.dead) == (0, 2)
    assert "2 dead letters" in render(report)
    (first, _), *_ = await run.redis.xrange(run.keys.dead)
    await run.redis.xdel(run.keys.dead, first)
    findings = (await audit(run)).findings
    assert "5 groups were accepted, 4 are accounted for" in findings
    assert "counters that contradict the queue: dead 2, recounted 1" in findings


async def test_a_dead_letter_without_its_data_is_found(run: Broker) -> None:
    await run.queue.lease("main", "r", lapse_s=0, max_deliveries=1)
    gid = (await run.dead.accepted())[0].entry.gid
    await run.redis.delete(run.keys.blob(gid))
    assert (await audit(run)).findings == [f"groups waiting without their data: {gid}"]


async def test_a_purged_group_that_is_still_somewhere_is_found(run: Broker) -> None:
    await run.redis.hincrby(run.keys.state, "purged", 1)
    assert (await audit(run)).findings == ["5 groups were accepted, 6 are accounted for"]


async def test_a_step_both_committed_and_given_up_is_found(run: Broker) -> None:
    await run.redis.hset(run.keys.skipped, "main:1", "")
    assert "steps both committed and given up: 1" in (await audit(run)).findings


async def test_counters_that_drifted_are_found(run: Broker) -> None:
    await run.redis.hincrby(run.keys.state, "env_bytes:-", 7)
    (finding,) = (await audit(run)).findings
    assert finding.startswith("counters that contradict the queue: env_bytes:- ")


async def test_a_lost_batch_is_found(run: Broker) -> None:
    await run.redis.xdel(run.keys.batches, "2-0")
    findings = (await audit(run)).findings
    assert "batches formed and neither committed nor kept: 2" in findings

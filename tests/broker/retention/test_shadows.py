"""Policies that read along: lossless ones hold formation back, lossy ones skip; and what is kept for whom."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from queued import dead, put
from scored import trained

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import AuditReport, audit
from lachesis.broker.records.steps import Lease
from lachesis.broker.retention.shadows import Rule

pytestmark = pytest.mark.anyio
BATCH = 4  # two groups of two
runs = itertools.count()


class Fleet:
    """`main`, which asks for batches, and shadows that read along."""

    def __init__(self, broker: Broker) -> None:
        self.broker, self.queue, self._numbers = broker, broker.queue, itertools.count()

    async def form(self) -> int | None:
        """Enough groups for one more batch, and the attempt to form it."""
        if not await self.queue.queued():
            await put(self.broker, *itertools.islice(self._numbers, 2))
        return await self.queue.form(BATCH)

    async def lease(self, policy: str) -> Lease | None:
        return await self.queue.lease(policy, "t", lapse_s=60, delivered=policy == "main")

    async def train(self, policy: str, *, saves: bool = True) -> int | None:
        """The next step that this policy trains; None if there is none now."""
        if (lease := await self.lease(policy)) is None:
            return None
        await self.queue.commit(policy, lease, trained(lease.batch))
        if saves:
            await self.queue.retire(policy, lease.batch.step)
        return lease.batch.step

    async def kept(self) -> list[int]:
        return [batch.step for batch in await self.queue.batches()]

    async def clean(self, policy: str) -> AuditReport:
        report = await audit(self.broker, policy)
        assert report.findings == []
        return report

    async def behind(self, policy: str) -> int:
        return {reading.policy: reading.behind for reading in await self.queue.shadows.readings()}[policy]


@pytest.fixture
async def fleet(broker: Broker) -> Fleet:
    await broker.queue.subscribe("main")
    return Fleet(broker)


async def test_nothing_is_formed_while_a_lossless_shadow_is_too_far_behind(fleet: Fleet) -> None:
    await fleet.queue.subscribe("shadow", Rule("lossless", 2))
    assert [await fleet.form() for _ in range(4)] == [1, 2, None, None]
    assert [await fleet.train("main") for _ in range(3)] == [1, 2, None]
    main, shadow = await fleet.queue.shadows.readings()
    assert (main.policy, main.rule, main.behind, main.holds) == ("main", None, 0, False)
    assert (shadow.rule, shadow.behind, shadow.holds) == (Rule("lossless", 2), 2, True)
    lease = await fleet.lease("shadow")
    assert lease is not None
    assert await fleet.form() is None  # borrowed is not trained
    await fleet.queue.commit("shadow", lease, trained(lease.batch))
    assert await fleet.form() == 3
    assert await fleet.form() is None
    assert [await fleet.train("shadow") for _ in range(3)] == [2, 3, None]
    for policy in ("main", "shadow"):
        report = await fleet.clean(policy)
        assert report.skipped == 0


async def test_a_lossy_shadow_skips_the_oldest_and_counts_them(fleet: Fleet) -> None:
    await fleet.queue.subscribe("shadow", Rule("lossy", 2))
    assert [await fleet.form() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    for _ in range(6):
        await fleet.train("main")
    assert await fleet.kept() == [5, 6]  # the others it would skip
    assert await fleet.behind("shadow") == 2
    assert [await fleet.train("shadow") for _ in range(3)] == [5, 6, None]
    report = await fleet.clean("shadow")
    assert (report.trained, report.skipped, report.steps) == (4, 8, 2)
    assert (await fleet.clean("main")).skipped == 0
    assert await fleet.kept() == []
    _, shadow = await fleet.queue.shadows.readings()
    assert (shadow.committed, shadow.skipped, shadow.behind, shadow.holds) == (2, 4, 0, False)


async def test_it_skips_what_is_still_kept_too(fleet: Fleet) -> None:
    await fleet.queue.subscribe("shadow", Rule("lossy", 1))
    for _ in range(3):
        await fleet.form()
    looked = await fleet.queue.upcoming("shadow", 0)
    assert looked is not None
    assert (looked.step, await fleet.train("shadow", saves=False)) == (3, 3)
    assert await fleet.kept() == [1, 2, 3]  # main has not trained them
    assert (await fleet.clean("shadow")).skipped == 4
    assert [await fleet.train("main") for _ in range(3)] == [1, 2, 3]
    assert await fleet.kept() == [3]  # which the shadow has trained, and not saved
    await fleet.queue.retire("shadow", 3)
    assert await fleet.kept() == []


async def test_what_a_lossy_shadow_trained_since_its_checkpoint_is_kept_while_it_is_away(fleet: Fleet) -> None:
    await fleet.queue.subscribe("shadow", Rule("lossy", 1))
    for step in range(1, 4):
        await fleet.form()
        await fleet.train("main")
        assert await fleet.train("shadow", saves=step == 1) == step
    await fleet.form()
    held = await fleet.lease("shadow")  # and now it is gone
    assert held is not None
    for _ in range(20):
        await fleet.train("main")
        await fleet.form()
    await fleet.train("main")
    assert await fleet.kept() == [2, 3, 4, 24]
    again = await fleet.lease("shadow")
    assert again is not None
    assert again.batch == held.batch
    assert await fleet.queue.fetch(again.batch.gids)
    await fleet.queue.commit("shadow", again, trained(again.batch))
    assert await fleet.train("shadow") == 24
    assert (await fleet.clean("shadow")).skipped == 2 * 19
    assert await fleet.kept() == []


async def test_a_batch_that_main_gives_up_is_no_lossy_shadows_to_save(fleet: Fleet) -> None:
    """Else it would be skipped by one, given up by the other, and nobody's dead letter."""
    await fleet.queue.subscribe("shadow", Rule("lossy", 1))
    for _ in range(2):
        await fleet.form()
    for _ in range(3):
        lease = await fleet.queue.lease("main", "t", lapse_s=0, max_deliveries=2)
    assert lease is not None
    assert lease.batch.step == 2
    assert [reason for _, reason, _, _ in await dead(fleet.broker)] == ["deliveries"] * 2
    assert await fleet.train("shadow") == 2
    for policy in ("main", "shadow"):
        await fleet.clean(policy)


async def test_one_that_it_has_read_is(fleet: Fleet) -> None:
    await fleet.queue.subscribe("shadow", Rule("lossy", 1))
    await fleet.form()
    assert await fleet.train("shadow", saves=False) == 1
    for _ in range(3):
        await fleet.queue.lease("main", "t", lapse_s=0, max_deliveries=2)
    assert await dead(fleet.broker) == []
    assert (await fleet.clean("main")).skipped == 2
    assert (await fleet.clean("shadow")).trained == 2


async def test_one_that_comes_late_is_told_what_it_missed(fleet: Fleet) -> None:
    for _ in range(4):
        await fleet.form()
        await fleet.train("main")
    await fleet.form()
    await fleet.queue.subscribe("late", Rule("lossless", 4))
    assert await fleet.train("late") == 5
    assert await fleet.train("main") == 5
    report = await fleet.clean("late")
    assert (report.accepted, report.trained, report.unseen) == (10, 2, 8)


async def test_nobody_waits_for_what_a_late_one_can_not_read_any_more(fleet: Fleet) -> None:
    for _ in range(4):
        await fleet.form()
        await fleet.train("main")
    assert await fleet.kept() == []
    await fleet.queue.subscribe("late", Rule("lossless", 1))
    assert await fleet.behind("late") == 0
    assert [await fleet.form(), await fleet.form()] == [5, None]
    assert await fleet.train("late") == 5
    assert await fleet.form() == 6


async def test_nor_where_what_is_kept_has_holes(fleet: Fleet) -> None:
    await fleet.queue.subscribe("away", Rule("lossy", 1))
    await fleet.form()
    assert await fleet.train("away", saves=False) == 1
    for _ in range(4):
        await fleet.train("main")
        await fleet.form()
    assert await fleet.train("main") == 5
    assert await fleet.kept() == [1, 5]
    await fleet.queue.subscribe("late", Rule("lossless", 1))
    assert await fleet.form() is None
    assert [await fleet.train("late"), await fleet.train("late")] == [1, 5]
    assert await fleet.form() == 6
    await fleet.clean("late")


async def test_who_leaves_is_waited_for_no_longer(fleet: Fleet) -> None:
    await fleet.queue.subscribe("shadow", Rule("lossless", 1))
    assert [await fleet.form(), await fleet.form()] == [1, None]
    assert await fleet.queue.retention.leave("shadow")
    assert await fleet.queue.shadows.rules() == {}
    assert await fleet.form() == 2


async def test_a_shadow_that_becomes_the_policy_to_train_is_none_any_more(fleet: Fleet) -> None:
    await fleet.queue.subscribe("shadow", Rule("lossless", 1))
    await fleet.queue.subscribe("shadow")
    assert [await fleet.form(), await fleet.form()] == [1, 2]


MOVES = ("form", "main", "keeps", "loses", "save", "away")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(moves=st.lists(st.sampled_from(MOVES), max_size=40), most=st.integers(1, 3), least=st.integers(1, 3))
async def test_whatever_happens_in_whatever_order(
    shared_redis: EmbeddedRedis, moves: list[str], most: int, least: int
) -> None:
    """Audits stay clean, no lossless shadow misses a step or falls too far behind, and what one needs is there."""
    broker = await Broker.connect(shared_redis.url, f"shadows{next(runs)}")
    fleet, steps, unsaved = Fleet(broker), [0], set[int]()
    try:
        await broker.queue.subscribe("main")
        await broker.queue.subscribe("keeps", Rule("lossless", most))
        await broker.queue.subscribe("loses", Rule("lossy", least))
        for move in moves:
            if move == "form":
                await fleet.form()
            elif move == "main":
                await fleet.train("main")
            elif move == "keeps" and (step := await fleet.train("keeps")):
                steps.append(step)
            elif move == "loses" and (step := await fleet.train("loses", saves=False)):
                unsaved.add(step)
            elif move == "away" and (lease := await fleet.lease("loses")):
                unsaved.add(lease.batch.step)
            elif move == "save" and unsaved:
                committed = await broker.queue.newest_committed("loses")
                if committed is not None:
                    await broker.queue.retire("loses", committed.step)
                    unsaved = {step for step in unsaved if step > committed.step}
            kept = await fleet.kept()
            assert unsaved <= {*kept}
            for batch in await broker.queue.batches():
                assert len(await broker.queue.fetch(batch.gids)) == 2
            assert await fleet.behind("keeps") <= most
            assert steps == [*range(steps[-1] + 1)]
            for policy in ("main", "keeps", "loses"):
                await fleet.clean(policy)
            assert (await audit(broker, "keeps")).skipped == 0
    finally:
        await broker.aclose()

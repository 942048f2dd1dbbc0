"""The scripts of a policy's replicas on a real Redis: who may do what, in which epoch of which generation."""

from __future__ import annotations

import anyio
import pytest
from replicas import BATCH, founded, lent, opened
from scored import group, trained

from lachesis.broker import Broker, Conflict, LeaseLost
from lachesis.broker.audit import audit
from lachesis.broker.errors import Diverged, Moved
from lachesis.broker.records.steps import LedgerEntry, Membership
from lachesis.broker.replicas.members import CONSUMER, NO_WEIGHTS, Claimed, Rendezvous, new_id
from lachesis.broker.retention.dead_letters import untrainable

pytestmark = pytest.mark.anyio


@pytest.fixture
async def filled(broker: Broker) -> Broker:
    """Three batches' worth of groups, two to a batch."""
    for number in range(6):
        await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0)
    return broker


async def join(broker: Broker, id_: str, *, generation: int = 1, step: int = NO_WEIGHTS) -> Membership:
    me = await broker.members.join("main", id_, generation=generation, step=step)
    assert me is not None
    return me


async def entry_of(broker: Broker, step: int) -> LedgerEntry:
    batch = await broker.queue.batch(step)
    assert batch is not None
    return trained(batch)


async def two_at_work(broker: Broker) -> tuple[Membership, Membership]:
    """Both in epoch 2 with step 1 open, of which each has claimed one group."""
    await founded(broker)
    b = await join(broker, "b", step=0)
    a = Membership("main", "a", 1, 2)
    assert await broker.members.open_step(a, await lent(broker))
    for me in (a, b):
        assert await broker.members.claim(me, 1, count=1, held=0) is not None
    return a, b


# -- coming and going ---------------------------------------------------------------------------------------------


async def test_the_founder_needs_the_writer_lock_and_gives_it_to_its_generation(broker: Broker) -> None:
    lock = broker.registry.writer("main", ttl_s=60)
    assert await lock.acquire(blocking=False)
    assert await broker.members.start_generation("main", "a", token="another", step=0, hold_s=60) is None
    token = lock.local.token.decode()
    assert await broker.members.start_generation("main", "a", token=token, step=0, hold_s=60) == Membership(
        "main", "a", 1, 1
    )
    assert await broker.redis.get(broker.keys.writer("main")) == b"replicas-1"
    assert not await broker.registry.writer("main", ttl_s=60).acquire(blocking=False)


async def test_a_founder_that_is_not_at_the_end_of_the_ledger_is_refused(broker: Broker) -> None:
    lock = broker.registry.writer("main", ttl_s=60)
    await lock.acquire(blocking=False)
    with pytest.raises(Conflict, match="its ledger ends at another"):
        await broker.members.start_generation("main", "a", token=lock.local.token.decode(), step=3, hold_s=60)
    assert await broker.members.epoch_state("main") is None


async def test_a_new_generation_has_none_of_the_old_members(broker: Broker) -> None:
    await founded(broker)
    await join(broker, "b")
    assert await founded(broker, "c") == Membership("main", "c", 2, 3)
    assert [member.id for member in await broker.members.members("main")] == ["c"]


async def test_nobody_joins_where_no_replicas_hold_the_lock(broker: Broker) -> None:
    assert await broker.members.join("main", "a", generation=0, step=0) is None
    await founded(broker)
    await broker.redis.delete(broker.keys.writer("main"))
    assert await broker.members.join("main", "b", generation=1, step=0) is None


@pytest.mark.parametrize(("generation", "step"), [(1, 0), (0, NO_WEIGHTS)])
async def test_weights_of_another_generation_are_of_no_use(broker: Broker, generation: int, step: int) -> None:
    await founded(broker)
    await join(broker, "b", generation=generation, step=0)
    assert [member.step for member in await broker.members.members("main")] == [0, step]


async def test_the_silent_are_evicted_and_those_with_a_limit_of_their_own_sooner(broker: Broker) -> None:
    await founded(broker)
    for id_ in "bcd":
        await join(broker, id_)
    await anyio.sleep(0.05)
    assert await broker.members.beat("main", "a", hold_s=60)
    assert await broker.members.evict("main", silent_s=60) == 0
    assert await broker.members.evict("main", silent_s=60, limits={"b": 0.04, "c": 0, "x": 0}) == 2
    assert [member.id for member in await broker.members.members("main")] == ["a", "d"]
    assert await broker.members.evict("main", silent_s=0.04, limits={"a": 60}) == 1
    epoch_state = await broker.members.epoch_state("main")
    assert epoch_state is not None
    assert (epoch_state.generation, epoch_state.epoch) == (1, 6)


async def test_the_lock_is_free_once_the_last_went_for_good(broker: Broker) -> None:
    await founded(broker)
    await join(broker, "b")
    for id_, for_good, is_held in (("b", True, True), ("a", False, True)):
        assert await broker.members.evict("main", silent_s=60, limits={id_: 0}, for_good=for_good) == 1
        assert await broker.members.is_held("main") == is_held
    await join(broker, "c")
    assert await broker.members.evict("main", silent_s=60, limits={"c": 0}, for_good=True) == 1
    assert not await broker.members.is_held("main")


async def test_only_members_with_the_newest_weights_keep_the_lock(broker: Broker) -> None:
    await founded(broker)
    await join(broker, "b")
    lock = broker.keys.writer("main")
    assert await broker.members.beat("main", "b", hold_s=1000)
    assert await broker.redis.pttl(lock) <= 60_000
    await broker.redis.delete(lock)  # Redis was away for longer than it is held
    assert await broker.members.beat("main", "b", hold_s=1000)
    assert not await broker.members.is_held("main")
    assert await broker.members.beat("main", "a", hold_s=1000)
    assert await broker.redis.pttl(lock) > 60_000
    await broker.redis.set(lock, "a founder")
    assert await broker.members.beat("main", "a", hold_s=1000)
    assert await broker.redis.get(lock) == b"a founder"
    assert not await broker.members.beat("main", "x", hold_s=1000)


async def test_beats_keep_the_lease_of_the_open_batch(filled: Broker) -> None:
    await opened(filled)
    await anyio.sleep(0.05)
    assert await filled.members.beat("main", "a", hold_s=60)
    assert await filled.queue.lease("main", "http", lapse_s=0.05) is None
    (pending,) = await filled.redis.xpending_range(filled.keys.batches, "main", "-", "+", 9)
    assert (pending["consumer"], pending["times_delivered"]) == (CONSUMER.encode(), 1)


# -- one epoch ----------------------------------------------------------------------------------------------------


async def test_all_meet_before_any_goes_on(broker: Broker) -> None:
    a = await founded(broker)
    b = await join(broker, "b")
    with pytest.raises(Moved):
        await broker.members.rendezvous(a)
    a = Membership("main", "a", 1, 2)
    assert await broker.members.rendezvous(a) is None
    assert (
        await broker.members.rendezvous(b)
        == await broker.members.rendezvous(a)
        == Rendezvous(0, {"a": 0, "b": NO_WEIGHTS})
    )


async def test_a_step_is_opened_once_and_only_while_the_replicas_have_its_batch(filled: Broker) -> None:
    me = await founded(filled)
    await filled.queue.subscribe("main")
    assert not await filled.members.open_step(me, 1)
    assert await lent(filled) == 1
    assert await filled.members.open_step(me, 1)
    assert await filled.members.claim(me, 1, count=1, held=0) == Claimed(((0, "g0"),), left=1)
    assert await filled.members.open_step(me, 1)
    assert await filled.members.claim(me, 1, count=5, held=1) == Claimed(((1, "g1"),), left=0)
    assert await filled.members.vote(me, 1, "d", await entry_of(filled, 1))
    assert not await filled.members.open_step(me, 1)


async def test_every_group_is_claimed_once_and_orphans_by_those_that_are_left(filled: Broker) -> None:
    a, b = await two_at_work(filled)
    assert await filled.members.claim(a, 1, count=1, held=1) is None
    assert [member.holds for member in await filled.members.members("main")] == [1, 1]
    await filled.members.evict("main", silent_s=60, limits={"b": 0})
    with pytest.raises(Moved):
        await filled.members.claim(a, 1, count=1, held=1)
    a = Membership("main", "a", 1, 3)
    assert await filled.members.claim(a, 1, count=1, held=1) == Claimed(((1, "g1"),), left=0)
    assert await filled.members.claim(a, 1, count=1, held=2) is None
    with pytest.raises(Moved):
        await filled.members.claim(b, 1, count=1, held=1)


async def test_the_last_vote_commits(filled: Broker) -> None:
    a, b = await two_at_work(filled)
    entry, letter = await entry_of(filled, 1), untrainable("g0", 1, "too long")
    assert not await filled.members.vote(b, 1, "d", entry, untrainable=[letter])
    assert [member.voted for member in await filled.members.members("main")] == [False, True]
    assert await filled.members.vote(a, 1, "d", entry, untrainable=[letter])
    assert await filled.members.vote(b, 1, "d", entry, untrainable=[letter])
    assert [entry.step async for entry in filled.queue.ledger("main")] == [1]
    assert (await filled.redis.xpending(filled.keys.batches, "main"))["pending"] == 0
    assert (await filled.queue.status()).untrainable == 1
    assert [(member.step, member.trained) for member in await filled.members.members("main")] == [(1, 1), (1, 1)]
    assert await filled.redis.exists(filled.keys.work("main")) == 0
    assert (await audit(filled)).findings == []


async def test_votes_of_an_earlier_epoch_count_for_nothing(filled: Broker) -> None:
    a, b = await two_at_work(filled)
    entry = await entry_of(filled, 1)
    assert not await filled.members.vote(b, 1, "d", entry)
    await join(filled, "c", step=0)
    with pytest.raises(Moved):
        await filled.members.vote(a, 1, "d", entry)
    a = Membership("main", "a", 1, 3)
    assert not await filled.members.vote(a, 1, "d", entry)
    assert not await filled.members.vote(Membership("main", "c", 1, 3), 1, "d", entry)


async def test_a_replica_evicted_after_its_vote_learns_that_the_step_was_committed(filled: Broker) -> None:
    a, b = await two_at_work(filled)
    entry = await entry_of(filled, 1)
    assert not await filled.members.vote(b, 1, "d", entry)
    assert await filled.members.vote(a, 1, "d", entry)
    await filled.members.evict("main", silent_s=60, limits={"b": 0})
    assert await filled.members.vote(b, 1, "d", entry)


async def test_other_gradients_stop_the_step(filled: Broker) -> None:
    a, b = await two_at_work(filled)
    entry = await entry_of(filled, 1)
    assert not await filled.members.vote(b, 1, "d", entry)
    with pytest.raises(Diverged, match="must run the same versions"):
        await filled.members.vote(a, 1, "other", entry)


async def test_no_commit_with_unclaimed_groups_or_without_the_newest_weights(filled: Broker) -> None:
    me = await opened(filled)
    await filled.members.claim(me, 1, count=1, held=0)
    with pytest.raises(LeaseLost, match="unclaimed"):
        await filled.members.vote(me, 1, "d", await entry_of(filled, 1))
    b = await join(filled, "b")
    await filled.members.claim(b, 1, count=1, held=0)
    with pytest.raises(LeaseLost, match="unclaimed"):
        await filled.members.vote(b, 1, "d", await entry_of(filled, 1))
    await filled.members.mark_current(b, 0)
    assert not await filled.members.vote(b, 1, "d", await entry_of(filled, 1))


async def test_no_commit_while_a_founder_holds_the_lock(filled: Broker) -> None:
    me = await opened(filled)
    await filled.members.claim(me, 1, count=2, held=0)
    await filled.redis.set(filled.keys.writer("main"), "a founder")
    assert not await filled.members.vote(me, 1, "d", await entry_of(filled, 1))
    assert await filled.queue.newest_committed("main") is None


async def test_one_may_heal_without_the_lock_which_only_a_commit_needs(filled: Broker) -> None:
    """Weights that are handed over while a founder holds the lock harm nobody: no vote of theirs counts."""
    a = await opened(filled)
    b = await join(filled, "b")
    await filled.members.claim(b, 1, count=2, held=0)
    assert not await filled.members.is_ousted("main", b.generation)
    await filled.redis.set(filled.keys.writer("main"), "a founder")
    assert await filled.members.is_ousted("main", b.generation)
    await filled.members.mark_current(b, 0)
    entry = await entry_of(filled, 1)
    assert not await filled.members.vote(Membership("main", "a", a.generation, b.epoch), 1, "d", entry)
    assert not await filled.members.vote(b, 1, "d", entry)
    assert await filled.queue.newest_committed("main") is None
    await filled.redis.delete(filled.keys.writer("main"))
    assert not await filled.members.is_ousted("main", b.generation)
    assert await filled.members.beat("main", "b", hold_s=60)  # it has the newest weights: it takes the lock back
    await filled.members.vote(Membership("main", "a", a.generation, b.epoch), 1, "d", entry)
    assert await filled.members.vote(b, 1, "d", entry)


async def test_a_zombie_from_before_a_rollback_commits_nothing(filled: Broker) -> None:
    """It is in the same step, the same epoch number even, and has all votes of its time."""
    zombie = await opened(filled)
    await filled.members.claim(zombie, 1, count=2, held=0)
    me = await founded(filled, "b")
    assert await filled.members.open_step(me, await lent(filled))
    for epoch in (zombie.epoch, me.epoch):
        with pytest.raises(Moved):
            await filled.members.vote(Membership("main", "a", 1, epoch), 1, "d", await entry_of(filled, 1))
    assert await filled.members.claim(me, 1, count=2, held=0) == Claimed(((0, "g0"), (1, "g1")), left=0)
    assert await filled.members.vote(me, 1, "d", await entry_of(filled, 1))


async def test_what_was_given_up_under_the_replicas_is_not_committed(filled: Broker) -> None:
    me = await opened(filled)
    await filled.members.claim(me, 1, count=2, held=0)
    entry = await entry_of(filled, 1)
    lease = await filled.queue.lease_or_form("main", CONSUMER, BATCH, lapse_s=0, max_deliveries=1)
    assert lease is not None
    assert lease.batch.step == 2
    with pytest.raises(LeaseLost, match="gone"):
        await filled.members.vote(me, 1, "d", entry)
    assert await filled.members.open_step(me, await lent(filled))
    with pytest.raises(LeaseLost, match="not open any more"):
        await filled.members.claim(me, 1, count=1, held=2)
    assert await filled.members.claim(me, 2, count=2, held=0) == Claimed(((0, "g2"), (1, "g3")), left=0)
    assert await filled.members.vote(me, 2, "d", await entry_of(filled, 2))
    assert (await audit(filled)).findings == []


async def test_a_closed_step_is_void_and_all_meet_anew_for_another(filled: Broker) -> None:
    a, b = await two_at_work(filled)
    assert not await filled.members.vote(a, 1, "d", await entry_of(filled, 1))
    await filled.redis.delete(filled.keys.blob("g1"))
    await filled.members.close_step(b, 1, why="group g1 has no blob")
    for me in (a, b):
        with pytest.raises(Moved):
            await filled.members.vote(me, 1, "d", await entry_of(filled, 1))
        with pytest.raises(Moved):
            await filled.members.close_step(me, 1, why="it does not know yet")
    epoch_state = await filled.members.epoch_state("main")
    assert epoch_state is not None
    assert (epoch_state.epoch, epoch_state.open) == (3, 0)
    assert await filled.redis.exists(filled.keys.work("main")) == 0
    _, told = (await filled.redis.xrevrange(filled.keys.control, count=1))[0]
    assert told == {b"event": b"closed", b"who": b"b", b"detail": b"step 1, epoch 3: group g1 has no blob"}

    a, b = Membership("main", "a", 1, 3), Membership("main", "b", 1, 3)
    assert (await filled.queue.refit("main", apart=[1])).dead == 1
    assert await filled.members.open_step(a, await lent(filled))
    assert await filled.members.claim(a, 2, count=2, held=0) == Claimed(((0, "g0"), (1, "g2")), left=0)
    assert not await filled.members.vote(b, 2, "d", await entry_of(filled, 2))
    assert await filled.members.vote(a, 2, "d", await entry_of(filled, 2))


async def test_only_the_step_that_is_open_is_closed(filled: Broker) -> None:
    me = await opened(filled)
    with pytest.raises(LeaseLost, match="not open any more"):
        await filled.members.close_step(me, 2, why="a mistake")
    assert await filled.members.claim(me, 1, count=2, held=0) == Claimed(((0, "g0"), (1, "g1")), left=0)


async def test_a_reset_forgets_the_replicas(filled: Broker) -> None:
    me = await opened(filled)
    await filled.reset()
    assert await filled.members.epoch_state("main") is None
    assert await filled.members.members("main") == []
    with pytest.raises(Moved):
        await filled.members.claim(me, 1, count=1, held=0)
    assert not await filled.members.beat("main", "a", hold_s=60)


def test_every_life_has_an_id_of_its_own() -> None:
    assert new_id("host").startswith("host:")
    assert new_id("host") != new_id("host")


async def test_replicas_can_be_looked_at_while_steps_open_and_close(broker: Broker) -> None:
    me, work = await founded(broker), broker.keys.work("main")

    async def open_and_close(tasks: anyio.abc.TaskGroup) -> None:
        for _ in range(500):
            await broker.redis.xgroup_create(work, "trainers", "0", mkstream=True)
            await broker.redis.delete(work)
        tasks.cancel_scope.cancel()

    looks = 0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_and_close, tasks)
        while True:
            assert [(member.id, member.holds) for member in await broker.members.members("main")] == [(me.id, 0)]
            looks += 1
    assert looks > 100

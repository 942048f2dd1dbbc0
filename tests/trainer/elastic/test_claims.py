"""A replica claims groups while it computes, on a real Redis: when, and what becomes of them."""

from __future__ import annotations

import time

import pytest
from replicas import opened
from scored import group
from trainer_kit import until

from lachesis.broker import BlockingBroker
from lachesis.broker.records.steps import BatchEntry, Membership
from lachesis.trainer.elastic.claims import ClaimPolicy, Claims
from lachesis.trainer.elastic.config import ElasticConfig

GROUPS = 6
TEAM = ElasticConfig("main", 2 * GROUPS, 1, silent_s=60, hold_s=60)
BATCH = BatchEntry(1, tuple(f"g{number}" for number in range(GROUPS)), 2 * GROUPS, 0, 0, 0, 0.0)
FAST, SLOW = 1.0, float(GROUPS)  # groups that another one computes meanwhile


def claim_policy(others: float, speed: float = 0.0) -> ClaimPolicy:
    found = ClaimPolicy()
    found.others, found.speed = others, speed
    return found


@pytest.fixture
def me(blocking: BlockingBroker) -> Membership:
    """The only replica, with a step of GROUPS open."""
    for number in range(GROUPS):
        blocking.call(blocking.broker.queue.put, f"g{number}", group(number), v_min=0, v_max=0)
    return blocking.call(opened, blocking.broker, batch_size=2 * GROUPS)


def holds(broker: BlockingBroker) -> int:
    (member,) = broker.call(broker.broker.members.members, "main")
    return member.holds


def test_all_groups_come_once_with_their_contents(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, BATCH, {}, claim_policy(FAST)) as claims:
        found = [one for groups in iter(claims.next, []) for one in groups]
    assert [(place, told.gid) for place, told in found] == [(number, f"g{number}") for number in range(GROUPS)]
    assert [[row.tolist() for row in told.tokens] for _, told in found] == [
        group(number).tokens for number in range(GROUPS)
    ]


def test_the_next_group_is_claimed_while_one_is_computed(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, BATCH, {}, claim_policy(FAST)) as claims:
        claims.next()
        until(lambda: holds(blocking) == 2)
        for _ in range(GROUPS - 1):
            claims.next()
        assert holds(blocking) == GROUPS


@pytest.mark.parametrize("known", [ClaimPolicy(), claim_policy(SLOW)], ids=["unknown", "slow"])
def test_not_by_one_that_is_slow_or_may_be(blocking: BlockingBroker, me: Membership, known: ClaimPolicy) -> None:
    with Claims(blocking, TEAM, me, BATCH, {}, known) as claims:
        claims.next()
        time.sleep(0.1)
        assert holds(blocking) == 1


def test_what_was_claimed_and_not_taken_comes_again(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, BATCH, {}, claim_policy(FAST)) as claims:
        [(first, _)] = claims.next()
        until(lambda: holds(blocking) == 2)
    with Claims(blocking, TEAM, me, BATCH, {first}, claim_policy(FAST)) as claims:
        places = [place for groups in iter(claims.next, []) for place, _ in groups]
    assert places == [1, 2, 3, 4, 5]


def test_nothing_is_asked_when_living_replicas_have_all(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, BATCH, {}, ClaimPolicy()) as claims:
        for _ in range(GROUPS):
            claims.next()
        blocking.call(blocking.broker.members.evict, "main", silent_s=60, limits={me.id: 0})
        assert claims.next() == []  # who died since is noticed when the sums are made


@pytest.mark.parametrize(
    ("known", "sizes"),
    [
        (claim_policy(0.0, speed=1e6), [6]),
        (claim_policy(0.0, speed=2 / TEAM.together_s), [2]),
        (claim_policy(FAST, speed=1e6), [3]),
        (claim_policy(SLOW, speed=1e6), [1]),
        (ClaimPolicy(), [1]),
    ],
    ids=["alone", "alone_for_so_long", "alike", "slow", "unknown"],
)
def test_so_many_are_claimed_at_once(
    blocking: BlockingBroker, me: Membership, known: ClaimPolicy, sizes: list[int]
) -> None:
    with Claims(blocking, TEAM, me, BATCH, {}, known) as claims:
        assert [len(claims.next()) for _ in sizes] == sizes


def test_what_is_held_from_before_is_not_left(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, BATCH, {}, claim_policy(FAST)) as claims:
        held = {place for _ in range(4) for place, _ in claims.next()}
    with Claims(blocking, TEAM, me, BATCH, held, claim_policy(FAST, speed=1e6)) as claims:
        assert len(claims.next()) == 1  # of two that are left


def test_how_fast_it_is_is_measured(blocking: BlockingBroker, me: Membership) -> None:
    known = claim_policy(FAST)
    with Claims(blocking, TEAM, me, BATCH, {}, known) as claims:
        while claims.next():
            time.sleep(0.02)
    assert 0 < known.speed <= 50  # a sleep may be longer

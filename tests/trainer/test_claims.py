"""A replica claims groups while it computes, on a real Redis: when, and what becomes of them."""

from __future__ import annotations

import time

import pytest
from replicas import opened
from scored import group
from trainer_kit import until

from lachesis.broker import BlockingBroker
from lachesis.broker.records import Membership
from lachesis.trainer.claims import Claims, Pace
from lachesis.trainer.duties import Team

GROUPS = 6
TEAM = Team("main", 2 * GROUPS, 1, silent_s=60, hold_s=60)
FAST, SLOW = 1.0, float(GROUPS)  # groups that another one computes meanwhile


def pace(others: float) -> Pace:
    found = Pace()
    found.others = others
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
    with Claims(blocking, TEAM, me, 1, {}, pace(FAST)) as claims:
        found = [one for groups in iter(claims.next, []) for one in groups]
    assert [(place, told.gid) for place, told in found] == [(number, f"g{number}") for number in range(GROUPS)]
    assert [[row.tolist() for row in told.tokens] for _, told in found] == [
        group(number).tokens for number in range(GROUPS)
    ]


def test_the_next_group_is_claimed_while_one_is_computed(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, 1, {}, pace(FAST)) as claims:
        claims.next()
        until(lambda: holds(blocking) == 2)
        for _ in range(GROUPS - 1):
            claims.next()
        assert holds(blocking) == GROUPS


@pytest.mark.parametrize("known", [Pace(), pace(SLOW)], ids=["unknown", "slow"])
def test_not_by_one_that_is_slow_or_may_be(blocking: BlockingBroker, me: Membership, known: Pace) -> None:
    with Claims(blocking, TEAM, me, 1, {}, known) as claims:
        claims.next()
        time.sleep(0.1)
        assert holds(blocking) == 1


def test_what_was_claimed_and_not_taken_comes_again(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, 1, {}, pace(FAST)) as claims:
        [(first, _)] = claims.next()
        until(lambda: holds(blocking) == 2)
    with Claims(blocking, TEAM, me, 1, {first}, pace(FAST)) as claims:
        places = [place for groups in iter(claims.next, []) for place, _ in groups]
    assert places == [1, 2, 3, 4, 5]


def test_nothing_is_asked_when_living_replicas_have_all(blocking: BlockingBroker, me: Membership) -> None:
    with Claims(blocking, TEAM, me, 1, {}, Pace()) as claims:
        for _ in range(GROUPS):
            claims.next()
        blocking.call(blocking.broker.members.evict, "main", silent_s=60, limits={me.id: 0})
        assert claims.next() == []  # who died since is noticed when the sums are made


@pytest.mark.parametrize(
    ("others", "expected"),
    [([1], 1.0), ([2], 2.0), ([0], 0.0), ([5], float("inf")), ([2, 1], 2.0)],
    ids=["alike", "slower", "alone", "all_at_once", "ran_out"],
)
def test_pace_is_what_others_claim_meanwhile(
    blocking: BlockingBroker, me: Membership, others: list[int], expected: float
) -> None:
    """`others`: groups that another replica claims while this one computes its first, its second, …"""
    other = blocking.call(blocking.broker.members.join, "main", "b", generation=me.generation, step=0)
    assert other is not None
    mine, known, held = Membership("main", me.id, me.generation, other.epoch), Pace(), 0
    with Claims(blocking, TEAM, mine, 1, {}, known) as claims:
        assert claims.next()
        for count in others:
            if count:
                assert blocking.call(blocking.broker.members.claim, other, 1, count=count, held=held)
                held += count
            claims.next()
    assert known.others == expected

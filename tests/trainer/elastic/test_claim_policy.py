"""How many groups a replica claims: never so many that it still has several when nobody else finds one."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lachesis.trainer.elastic.claims import ClaimPolicy

speeds = st.lists(st.floats(0.1, 1000), min_size=1, max_size=6)


def config(*speeds: float) -> list[ClaimPolicy]:
    """Replicas that have told each other how fast they are; 0: they have not computed anything."""
    found = [ClaimPolicy() for _ in speeds]
    for claim_policy, speed in zip(found, speeds, strict=True):
        claim_policy.met(len(speeds))
        if speed:
            claim_policy.computed(10, 10 / speed)
    words = [claim_policy.word for claim_policy in found]
    for claim_policy in found:
        claim_policy.hear(sum(speed for speed, _ in words), sum(known for _, known in words))
    return found


@pytest.mark.parametrize(
    ("known", "others"),
    [((5.0,), [0.0]), ((5.0, 5.0), [1.0, 1.0]), ((6.0, 3.0, 1.0), [2 / 3, 7 / 3, 9.0]), ((5.0, 0.0, 5.0), [2.0, inf, 2.0])],
    ids=["alone", "alike", "different", "unknown"],
)  # fmt: skip
def test_what_others_compute_meanwhile(known: tuple[float, ...], others: list[float]) -> None:
    assert [claim_policy.others for claim_policy in config(*known)] == pytest.approx(others)


def test_who_came_is_not_known() -> None:
    claim_policy, _ = config(5.0, 5.0)
    claim_policy.met(3)
    assert (claim_policy.others, claim_policy.count(100, 0, 10.0)) == (inf, 1)
    assert not claim_policy.allows(100, 1)
    claim_policy.met(1)
    assert claim_policy.others == 0


@given(known=speeds, left=st.integers(1, 500), busy=st.integers(0, 20), together_s=st.floats(0, 1000))
def test_others_find_some_until_it_comes_to_the_last(
    known: list[float], left: int, busy: int, together_s: float
) -> None:
    claim_policy, *_ = config(*known)
    if busy and not claim_policy.allows(left, busy):
        return
    count = claim_policy.count(left, busy, together_s)
    assert 1 <= count <= left
    near = 1 + 1e-3  # speeds are told in whole millionths
    assert count == 1 or (busy + count - 1) * claim_policy.others <= (left - count) * near
    assert count == 1 or count <= together_s * claim_policy.speed


@given(known=speeds, left=st.integers(1, 500))
def test_together_they_take_nearly_all_at_once(known: list[float], left: int) -> None:
    counts = [claim_policy.count(left, 0, inf) for claim_policy in config(*known)]
    assert left - len(known) < sum(counts) <= left + 2 * len(known)

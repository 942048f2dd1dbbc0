"""How many groups a replica claims: never so many that it still has several when nobody else finds one."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lachesis.trainer.elastic.claims import Pace

speeds = st.lists(st.floats(0.1, 1000), min_size=1, max_size=6)


def team(*speeds: float) -> list[Pace]:
    """Replicas that have told each other how fast they are; 0: they have not computed anything."""
    found = [Pace() for _ in speeds]
    for pace, speed in zip(found, speeds, strict=True):
        pace.met(len(speeds))
        if speed:
            pace.computed(10, 10 / speed)
    words = [pace.word for pace in found]
    for pace in found:
        pace.hear(sum(speed for speed, _ in words), sum(known for _, known in words))
    return found


@pytest.mark.parametrize(
    ("known", "others"),
    [((5.0,), [0.0]), ((5.0, 5.0), [1.0, 1.0]), ((6.0, 3.0, 1.0), [2 / 3, 7 / 3, 9.0]), ((5.0, 0.0, 5.0), [2.0, inf, 2.0])],
    ids=["alone", "alike", "different", "unknown"],
)  # fmt: skip
def test_what_others_compute_meanwhile(known: tuple[float, ...], others: list[float]) -> None:
    assert [pace.others for pace in team(*known)] == pytest.approx(others)


def test_who_came_is_not_known() -> None:
    pace, _ = team(5.0, 5.0)
    pace.met(3)
    assert (pace.others, pace.count(100, 0, 10.0)) == (inf, 1)
    assert not pace.allows(100, 1)
    pace.met(1)
    assert pace.others == 0


@given(known=speeds, left=st.integers(1, 500), busy=st.integers(0, 20), together_s=st.floats(0, 1000))
def test_others_find_some_until_it_comes_to_the_last(
    known: list[float], left: int, busy: int, together_s: float
) -> None:
    pace, *_ = team(*known)
    if busy and not pace.allows(left, busy):
        return
    count = pace.count(left, busy, together_s)
    assert 1 <= count <= left
    near = 1 + 1e-3  # speeds are told in whole millionths
    assert count == 1 or (busy + count - 1) * pace.others <= (left - count) * near
    assert count == 1 or count <= together_s * pace.speed


@given(known=speeds, left=st.integers(1, 500))
def test_together_they_take_nearly_all_at_once(known: list[float], left: int) -> None:
    counts = [pace.count(left, 0, inf) for pace in team(*known)]
    assert left - len(known) < sum(counts) <= left + 2 * len(known)

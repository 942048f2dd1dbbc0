"""The choice of a batch against brute force, and against upstream where upstream works."""

from __future__ import annotations

import pytest
from atroposlib.api.utils import grab_exact_from_heterogeneous_queue
from hypothesis import given, settings
from hypothesis import strategies as st

from lachesis.broker.allot import choose

sizes_of_queues = st.lists(st.integers(1, 9), max_size=10)
batch_sizes = st.integers(1, 24)


def oldest_subset(sizes: list[int], batch_size: int) -> list[int] | None:
    """Of all subsets with the right total, the one whose newest group is oldest, then its next newest, and so on."""
    found = [
        subset
        for subset in range(1 << len(sizes))
        if sum(size for index, size in enumerate(sizes) if subset >> index & 1) == batch_size
    ]
    return [index for index in range(len(sizes)) if min(found) >> index & 1] if found else None


@given(sizes_of_queues, batch_sizes)
@settings(max_examples=300, deadline=None)
def test_the_oldest_exact_subset_or_none(sizes: list[int], batch_size: int) -> None:
    assert choose(sizes, batch_size) == oldest_subset(sizes, batch_size)


@given(sizes_of_queues, batch_sizes)
def test_the_shortest_prefix_that_can(sizes: list[int], batch_size: int) -> None:
    chosen = choose(sizes, batch_size)
    if chosen is None:
        assert all(choose(sizes[:end], batch_size) is None for end in range(len(sizes)))
    else:
        assert choose(sizes[: chosen[-1] + 1], batch_size) == chosen
        assert choose(sizes[: chosen[-1]], batch_size) is None


@given(sizes_of_queues, batch_sizes, st.data())
def test_a_group_that_is_too_large_blocks_nothing(sizes: list[int], batch_size: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(sizes)))
    with_giant = [*sizes[:place], batch_size + 1, *sizes[place:]]
    without = choose(sizes, batch_size)
    assert choose(with_giant, batch_size) == (without and [index + (index >= place) for index in without])


@given(st.integers(1, 8), st.integers(0, 20), st.integers(1, 40))
def test_equal_sizes_are_batched_as_upstream_does(size: int, count: int, batch_size: int) -> None:
    queue = [{"tokens": [[number]] * size} for number in range(count)]
    upstream, _ = grab_exact_from_heterogeneous_queue(queue, batch_size)
    chosen = choose([size] * count, batch_size)
    assert chosen == (None if upstream is None else [group["tokens"][0][0] for group in upstream])


def test_what_deadlocks_upstream_does_not_here() -> None:
    assert choose([8, 3, 8, 1], 12) == [0, 1, 3]
    assert choose([4, 2, 2, 2], 8) == [0, 1, 2]
    assert choose([], 1) is None


def test_a_batch_has_at_least_one_sequence() -> None:
    with pytest.raises(ValueError, match="batch_size = 0"):
        choose([1], 0)

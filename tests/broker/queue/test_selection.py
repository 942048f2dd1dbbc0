"""The choice of a batch against brute force, and against upstream where upstream works."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from atroposlib.api.utils import (
    find_groups_summing_to_target,
    grab_batch_with_minimum_allocations,
    grab_exact_from_heterogeneous_queue,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lachesis.broker.queue.selection import (
    TURN_EVERY,
    attainable,
    left_over,
    minimums,
    select,
    select_batch,
    select_with_minimums,
)

Groups = list[tuple[str, int]]  # (environment, sequences), oldest first

sizes_of_queues = st.lists(st.integers(1, 9), max_size=10)
batch_sizes = st.integers(1, 24)
env_names = st.sampled_from(("0", "1", "2", "-"))
queues = st.lists(st.tuples(env_names, st.integers(1, 6)), max_size=9)
promises = st.dictionaries(st.sampled_from(("0", "1", "2")), st.integers(1, 12), max_size=3)
shares = st.dictionaries(st.integers(0, 2), st.sampled_from((0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0)), max_size=3)
powers_of_two = st.sampled_from((1, 2, 4))


def subsets(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """All that have the right total; oldest first: by their newest group, then their next newest, and so on."""
    return [
        [index for index in range(len(sizes)) if subset >> index & 1]
        for subset in range(1 << len(sizes))
        if sum(size for index, size in enumerate(sizes) if subset >> index & 1) == batch_size
    ]


def taken(groups: Groups, chosen: Sequence[int], env: str) -> int:
    return sum(groups[index][1] for index in chosen if groups[index][0] == env)


def counted(groups: Groups) -> dict[str, Counter[int]]:
    waiting: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for env, size in groups:
        waiting[env][size] += 1
    return waiting


def batch_of(groups: Groups, batch_size: int, least: dict[str, int], step: int = 1) -> list[int] | None:
    """As the queue does it: what the counters promise, then the choice."""
    met = attainable(counted(groups), least, batch_size)
    if met is None:
        return None
    sizes, envs = [size for _, size in groups], [env for env, _ in groups]
    return select_batch(sizes, envs, batch_size, met, counted(groups), step)


# -- without minimums ---------------------------------------------------------------------------------------------


@given(sizes_of_queues, batch_sizes)
@settings(max_examples=300, deadline=None)
def test_the_oldest_exact_subset_or_none(sizes: list[int], batch_size: int) -> None:
    found = subsets(sizes, batch_size)
    assert select(sizes, batch_size) == (found[0] if found else None)


@given(sizes_of_queues, batch_sizes)
def test_the_shortest_prefix_that_can(sizes: list[int], batch_size: int) -> None:
    chosen = select(sizes, batch_size)
    if chosen is None:
        assert all(select(sizes[:end], batch_size) is None for end in range(len(sizes)))
    else:
        assert select(sizes[: chosen[-1] + 1], batch_size) == chosen
        assert select(sizes[: chosen[-1]], batch_size) is None


@given(sizes_of_queues, batch_sizes, st.data())
def test_a_group_that_is_too_large_blocks_nothing(sizes: list[int], batch_size: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(sizes)))
    with_giant = [*sizes[:place], batch_size + 1, *sizes[place:]]
    without = select(sizes, batch_size)
    assert select(with_giant, batch_size) == (without and [index + (index >= place) for index in without])


@given(st.integers(1, 8), st.integers(0, 20), st.integers(1, 40))
def test_equal_sizes_are_batched_as_upstream_does(size: int, count: int, batch_size: int) -> None:
    queue = [{"tokens": [[number]] * size} for number in range(count)]
    upstream, _ = grab_exact_from_heterogeneous_queue(queue, batch_size)
    chosen = select([size] * count, batch_size)
    assert chosen == (None if upstream is None else [group["tokens"][0][0] for group in upstream])


@given(st.lists(st.one_of(powers_of_two, st.integers(1, 9)), max_size=40), st.integers(1, 32))
def test_where_upstream_makes_a_batch_of_mixed_sizes_so_do_we(sizes: list[int], batch_size: int) -> None:
    upstream, _ = grab_exact_from_heterogeneous_queue([{"tokens": [[]] * size} for size in sizes], batch_size)
    chosen = select(sizes, batch_size)
    if upstream is not None:
        assert chosen is not None
    if chosen is not None:
        assert sum(sizes[index] for index in chosen) == batch_size


def test_what_deadlocks_upstream_does_not_here() -> None:
    assert select([8, 3, 8, 1], 12) == [0, 1, 3]
    assert select([4, 2, 2, 2], 8) == [0, 1, 2]
    assert select([], 1) is None


def test_a_batch_has_at_least_one_sequence() -> None:
    with pytest.raises(ValueError, match="batch_size = 0"):
        select([1], 0)
    for batch_size in (0, -1):
        assert attainable({"0": {1: 1}}, {}, batch_size) is None


def test_sizes_of_any_magnitude_are_no_work_while_little_is_queued() -> None:
    assert attainable({"0": {4: 2}}, {"0": 10**17}, 10**18) is None
    assert left_over({4: 2}, 10**18) == 8


# -- with minimums ------------------------------------------------------------------------------------------------


@given(queues, promises, st.integers(1, 12))
@settings(max_examples=500, deadline=None)
def test_as_much_of_the_minimums_as_there_can_be(groups: Groups, least: dict[str, int], batch_size: int) -> None:
    batches = subsets([size for _, size in groups], batch_size)
    given_to = [tuple(min(least[env], taken(groups, batch, env)) for env in least) for batch in batches]
    met = attainable(counted(groups), least, batch_size)
    assert met == (dict(zip(least, max(given_to), strict=True)) if batches else None)


@given(queues, promises, st.integers(1, 12), st.sampled_from((1, TURN_EVERY)))
@settings(max_examples=500, deadline=None)
def test_a_batch_is_exact_and_meets_what_can_be_met(
    groups: Groups, least: dict[str, int], batch_size: int, step: int
) -> None:
    chosen = batch_of(groups, batch_size, least, step)
    oldest = select([size for _, size in groups], batch_size)
    assert (chosen is None) == (oldest is None)
    if chosen is None or oldest is None:
        return
    assert chosen == sorted(set(chosen))
    assert sum(groups[index][1] for index in chosen) == batch_size
    met = attainable(counted(groups), least, batch_size) or {}
    assert all(taken(groups, chosen, env) >= minimum for env, minimum in met.items())
    if step == 1 and all(taken(groups, oldest, env) >= minimum for env, minimum in met.items()):
        assert chosen == oldest
    if step == TURN_EVERY:
        fine = [
            batch
            for batch in subsets([size for _, size in groups], batch_size)
            if all(taken(groups, batch, env) >= minimum for env, minimum in met.items())
        ]
        assert min(chosen) == min(map(min, fine))


@given(queues, promises, st.integers(1, 12))
def test_none_only_if_no_batch_meets_the_minimums(groups: Groups, least: dict[str, int], batch_size: int) -> None:
    sizes, envs = [size for _, size in groups], [env for env, _ in groups]
    fine = [
        batch
        for batch in subsets(sizes, batch_size)
        if all(taken(groups, batch, env) >= minimum for env, minimum in least.items())
    ]
    chosen = select_with_minimums(sizes, envs, batch_size, least)
    assert chosen in fine if fine else chosen is None


def upstream_batch(groups: Groups, allocations: dict[int, float], batch_size: int) -> list[int] | None:
    queue: list[dict[str, Any]] = [
        {"tokens": [[]] * size, "env_id": None if env == "-" else int(env), "number": number}
        for number, (env, size) in enumerate(groups)
    ]
    configs: list[dict[str, Any]] = [
        {"connected": True, "registered_id": env, "min_batch_allocation": allocations.get(env)} for env in range(3)
    ]
    batch, _ = grab_batch_with_minimum_allocations(queue, batch_size, configs)
    return None if batch is None else sorted(group["number"] for group in batch)


@given(
    st.lists(
        st.tuples(env_names, st.one_of(powers_of_two, powers_of_two, st.integers(1, 4))), min_size=12, max_size=40
    ),
    shares,
    st.sampled_from((4, 8, 12, 16)),
)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_where_upstream_meets_the_minimums_so_do_we(
    groups: Groups, allocations: dict[int, float], batch_size: int
) -> None:
    theirs = upstream_batch(groups, allocations, batch_size)
    assume(theirs is not None)
    assert theirs is not None
    least = minimums({str(env): share for env, share in allocations.items()}, batch_size)
    assert all(env in counted(groups) for env in least), "upstream makes no batch where we would wait"
    ours = batch_of(groups, batch_size, least)
    assert ours is not None
    if all(taken(groups, theirs, env) >= minimum for env, minimum in least.items()):
        assert all(taken(groups, ours, env) >= minimum for env, minimum in least.items())


@given(st.lists(st.sampled_from("012"), max_size=40), st.integers(1, 4), shares, st.integers(1, 10))
def test_equal_sizes_with_minimums_are_batched_as_upstream_does(
    envs: list[str], size: int, allocations: dict[int, float], count: int
) -> None:
    groups = [(env, size) for env in envs]
    theirs = upstream_batch(groups, allocations, size * count)
    least = minimums({str(env): share for env, share in allocations.items()}, size * count)
    assume(theirs is not None and sum(-(-minimum // size) for minimum in least.values()) <= count)
    assert batch_of(groups, size * count, least) == theirs


def test_what_deadlocks_upstream_with_minimums_does_not_here() -> None:
    assert batch_of([("0", 4), ("0", 4)], 8, {"0": 2, "1": 4}) == [0, 1]  # nothing of 1
    assert batch_of([("0", 4), ("1", 3), ("0", 4)], 8, {"1": 2}) == [0, 2]  # 3 does not fit
    assert batch_of([("0", 9), ("-", 4), ("0", 3), ("0", 1)], 8, {"0": 4}) == [1, 2, 3]


def test_minimums_of_more_than_a_batch_are_scaled() -> None:
    assert minimums({"0": 0.25, "1": 0.0, "2": 0.01, "3": -1.0}, 32) == {"0": 8}
    assert minimums({"0": 1.0, "1": 1.0, "2": 2.0}, 32) == {"0": 8, "1": 8, "2": 16}
    assert minimums({"0": 1.0, "1": 100.0}, 8) == {"0": 1, "1": 7}


@given(
    st.lists(st.tuples(env_names, st.integers(1, 4)), min_size=20, max_size=40),
    st.dictionaries(st.sampled_from(("0", "1")), st.integers(1, 4), max_size=2),
)
@settings(deadline=None)
def test_no_group_waits_for_ever(groups: Groups, least: dict[str, int]) -> None:
    """What is taken arrives again, for ever: all that were there get their turn, but those for which minimums leave none."""
    queue = list(enumerate(groups))
    for number in range(8 * len(groups)):
        step = 1 if number % 8 else TURN_EVERY  # turns more often than they come, to be done sooner
        chosen = batch_of([group for _, group in queue], 12, least, step)
        assert chosen is not None
        again = [(number + len(groups), group) for number, group in (queue[index] for index in chosen)]
        queue = [item for index, item in enumerate(queue) if index not in chosen] + again
    met = attainable(counted(groups), least, 12) or {}
    for number, (env, size) in queue:
        if number < len(groups):
            others = [group for other, group in queue if other != number]
            still = {name: max(0, minimum - size * (name == env)) for name, minimum in met.items()}
            sizes, envs = [size for _, size in others], [env for env, _ in others]
            assert select_with_minimums(sizes, envs, 12 - size, still) is None, f"group {number} waits for ever"


# -- many ---------------------------------------------------------------------------------------------------------


def one_by_one(sizes: Sequence[int], total: int) -> list[int] | None:
    """The definition of `choose`, group by group and total by total: quadratic, and beyond doubt."""
    reach, reach_before = {0}, []
    for size in sizes:
        if total in reach:
            break
        reach_before.append(reach)
        reach = reach | {before + size for before in reach if before + size <= total}
    if total not in reach:
        return None
    chosen = []
    for index in range(len(reach_before) - 1, -1, -1):
        if total and total not in reach_before[index]:
            chosen.append(index)
            total -= sizes[index]
    return chosen[::-1]


def attainable_one_by_one(groups: Groups, least: dict[str, int], batch_size: int) -> dict[str, int] | None:
    """The definition of `attainable`: sums of each environment's totals, one environment after the other."""

    def totals(sizes: list[int]) -> set[int]:
        reach = {0}
        for size in sizes:
            reach |= {before + size for before in reach if before + size <= batch_size}
        return reach

    def sums(some: set[int], others: set[int]) -> set[int]:
        return {one + other for one in some for other in others if one + other <= batch_size}

    of = {env: totals([size for name, size in groups if name == env]) for env in least}
    before, met = totals([size for env, size in groups if env not in least]), {}
    for env, minimum in least.items():
        rest = before
        for later in [name for name in least if name not in met and name != env]:
            rest = sums(rest, of[later])
        possible = [total for total in of[env] if batch_size - total in rest]
        if not possible:
            return None
        met[env] = min(minimum, max(possible))
        before = sums(before, {total for total in of[env] if total >= met[env]})
    return met if batch_size in before else None


pools = st.sampled_from(((1,), (4,), (1, 2), (2, 4, 8), (3, 5), (6, 10, 15), (2, 7, 30), (8, 16, 17), (1, 9, 100)))


@given(pools, st.data(), st.integers(1, 150))
@settings(max_examples=200, deadline=None)
def test_the_choice_among_many_is_what_its_definition_says(
    pool: tuple[int, ...], data: st.DataObject, batch_size: int
) -> None:
    sizes = data.draw(st.lists(st.sampled_from(pool), max_size=120))
    assert select(sizes, batch_size) == one_by_one(sizes, batch_size)


@given(pools, st.data(), promises, st.integers(1, 150))
@settings(max_examples=200, deadline=None)
def test_what_many_attain_is_what_its_definition_says(
    pool: tuple[int, ...], data: st.DataObject, least: dict[str, int], batch_size: int
) -> None:
    groups = data.draw(st.lists(st.tuples(env_names, st.sampled_from(pool)), max_size=80))
    least = {env: minimum * data.draw(st.integers(1, 10)) for env, minimum in least.items()}
    assert attainable(counted(groups), least, batch_size) == attainable_one_by_one(groups, least, batch_size)


@pytest.mark.parametrize("sizes", [(1,), (1, 2), (3, 4, 5)])
def test_the_largest_batch_there_may_be_is_made(sizes: tuple[int, ...]) -> None:
    """What is not linear in it takes hours, or all memory."""
    batch_size = 1 << 20
    waiting = {env: dict.fromkeys(sizes, batch_size) for env in "012"}
    least = {"0": batch_size // 2, "1": batch_size // 3}
    assert attainable(waiting, least, batch_size) == least
    assert attainable({"0": {2: batch_size}}, least, batch_size - 1) is None
    queue = [sizes[place % len(sizes)] for place in range(batch_size)]
    chosen = select(queue, batch_size)
    assert chosen is not None
    assert sum(queue[index] for index in chosen) == batch_size
    assert len(chosen) > len(range(chosen[-1])) - max(sizes) ** 2, "of the oldest few are left out"


@pytest.mark.parametrize("step", [1, TURN_EVERY])
def test_a_large_batch_with_minimums_is_made(step: int) -> None:
    batch_size = 1 << 16
    groups = [("012"[place * place % 3], 1 + place % 2) for place in range(batch_size)]
    least = {"0": batch_size // 3, "1": batch_size // 2}
    met = attainable(counted(groups), least, batch_size)
    assert met == least
    chosen = batch_of(groups, batch_size, least, step)
    assert chosen is not None
    assert sum(groups[index][1] for index in chosen) == batch_size
    assert all(taken(groups, chosen, env) >= minimum for env, minimum in least.items())


# -- odd sizes ----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from((1, 2, 4, 16)), max_size=20))
def test_odd_groups_are_buffered_as_upstream_does(sizes: list[int]) -> None:
    buffer: list[dict[str, list[int]]] = []
    for posted, size in enumerate(sizes, 1):
        buffer.append({"tokens": [0] * size})
        for index in reversed(find_groups_summing_to_target(buffer, 8)):
            buffer.pop(index)
        assert left_over(Counter(sizes[:posted]), 8) == sum(len(group["tokens"]) for group in buffer)


def test_nothing_adds_up_to_a_group_of_no_size() -> None:
    assert left_over({1: 2, 3: 1}, 0) == 5
    assert left_over({1: 2, 3: 1}, -1) == 5
    assert left_over({}, 4) == 0

"""Which queued groups make the next batch. Pure; the FORM script commits the choice, or refuses it as a whole.

A batch holds exactly `batch_size` sequences and never splits a group. Groups are taken oldest first: the shortest
prefix of the queue that has a subset of the right total is found, and within it the oldest such subset. So a group
that is too large, or of a size that does not divide the batch, never blocks the others, and is used as soon as a
complement for it arrives.

An environment may be promised a minimum of every batch. How much of it the queue can give is worked out from the
numbers of queued groups by environment and size (`attainable`), so the queue is only read when there is a batch in it.

Where sizes differ, others might pass a group by again and again. So every 64th batch is made around the oldest group
that any batch can hold: no group waits for ever that could be trained.

Sets of totals are bitsets: bit s of an integer says that some of the groups have s sequences together. What is large is
a batch, up to 2^20 sequences, and the queue; sizes are few, and small. So groups are counted by size, and c of one size
are log c shifts; and whether some of them have a total is asked of what they leave out, where that is less.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from lachesis.broker.queue.subset_sum import (
    add_counts,
    at_least_bits,
    complements,
    reachable_totals,
    total_of,
    totals_of_both,
)

TURN_EVERY = 64  # steps
OTHERS = ""  # in place of an environment: all that have no minimum


def select(sizes: Sequence[int], batch_size: int) -> list[int] | None:
    """Indices, in queue order, of the oldest groups that make a batch, or None if no batch can be made yet.

    `sizes` are the queued groups' numbers of sequences, oldest first.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: must be at least 1")
    return _oldest(sizes, batch_size)


def select_batch(
    sizes: Sequence[int],
    envs: Sequence[str],
    batch_size: int,
    minimums: Mapping[str, int],
    waiting: Mapping[str, Mapping[int, int]],
    step: int,
) -> list[int] | None:
    """Indices, in queue order, of the groups of batch `step`; None if it takes more of the queue than these groups.

    `sizes` and `envs` are of the oldest groups; `waiting` counts all of the queue, and `minimums` are attainable in it.
    """
    if step % TURN_EVERY == 0 and (oldest := _oldest_that_fits(sizes, envs, batch_size, minimums, waiting)) is not None:
        env, size = envs[oldest], sizes[oldest]
        others = [index for index in range(len(sizes)) if index != oldest]
        chosen = select_with_minimums(
            [sizes[index] for index in others],
            [envs[index] for index in others],
            batch_size - size,
            _less(minimums, env, size),
        )
        return None if chosen is None else sorted([oldest, *(others[place] for place in chosen)])
    return select_with_minimums(sizes, envs, batch_size, minimums)


def select_with_minimums(
    sizes: Sequence[int], envs: Sequence[str], batch_size: int, minimums: Mapping[str, int]
) -> list[int] | None:
    """Like `choose`, with at least `minimums[env]` sequences of each environment it names; None if that can't be.

    `envs` says whose the groups are. Three tries: the oldest batch; the oldest batch when each environment's oldest
    groups, up to its minimum, count as older than all others (upstream's two passes); any batch at all.
    """
    if not minimums:
        return _oldest(sizes, batch_size)
    heads = _heads(sizes, envs, minimums)
    for order in (range(len(sizes)), sorted(range(len(sizes)), key=lambda index: index not in heads)):
        found = _oldest([sizes[index] for index in order], batch_size)
        if found is None:
            return None
        chosen = sorted(order[place] for place in found)
        taken: Counter[str] = Counter()
        for index in chosen:
            taken[envs[index]] += sizes[index]
        if all(taken[env] >= minimum for env, minimum in minimums.items()):
            return chosen
    return _exact(sizes, envs, batch_size, minimums)


def minimums(allocations: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Sequences of a batch promised to each environment; more than a whole batch is scaled down, as upstream does.

    `allocations` are the environments' `min_batch_allocation`, fractions of a batch.
    """
    wanted = {env: int(batch_size * share) for env, share in allocations.items()}
    wanted = {env: least for env, least in wanted.items() if least > 0}
    total = sum(wanted.values())
    if total <= batch_size:
        return wanted
    return {env: max(1, least * batch_size // total) for env, least in wanted.items()}


def attainable(
    waiting: Mapping[str, Mapping[int, int]], minimums: Mapping[str, int], batch_size: int
) -> dict[str, int] | None:
    """How much of its minimum each environment can be given by what is queued; None if no batch can be made.

    `waiting[env][size]` counts queued groups. If not all minimums can be met at once, earlier environments come first.
    """
    if not 0 < batch_size <= sum(map(total_of, waiting.values())):
        return None
    unit = math.gcd(
        *(size for counts in waiting.values() for size, count in counts.items() if count > 0 and 0 < size <= batch_size)
    )
    if unit == 0 or batch_size % unit:
        return None
    limit = batch_size // unit
    counts = {
        env: Counter({size // unit: count for size, count in of_env.items() if count > 0 and 0 < size <= batch_size})
        for env, of_env in waiting.items()
    }
    # of the environments already settled, and those without a minimum
    before = reachable_totals(add_counts(of_env for env, of_env in counts.items() if env not in minimums), limit)
    promised = [(env, minimum, counts.get(env, Counter())) for env, minimum in minimums.items()]
    if not reachable_totals(add_counts(of_env for _, _, of_env in promised), limit, before) >> limit & 1:
        return None
    met = {}
    for place, (env, minimum, of_env) in enumerate(promised):
        totals = reachable_totals(of_env, limit)
        rest = reachable_totals(add_counts(later for _, _, later in promised[place + 1 :]), limit, before)
        possible = (totals & complements(rest, limit)).bit_length() - 1
        met[env] = min(minimum, possible * unit)
        if place + 1 < len(promised):
            before = totals_of_both(before, at_least_bits(totals, -(-met[env] // unit)), limit)
    return met


def left_over(counts: Mapping[int, int], group_size: int) -> int:
    """Sequences of groups (`counts[size]` of each size) that remain when all that make up `group_size` are set aside."""
    left = dict(counts)
    while 0 < group_size <= total_of(left):
        sizes = [size for size in sorted(left) for _ in range(min(left[size], group_size // size))]
        parts = Counter(sizes[index] for index in _oldest(sizes, group_size) or ())
        if not parts:
            break
        times = min(left[size] // count for size, count in parts.items())
        for size, count in parts.items():
            left[size] -= count * times
    return total_of(left)


def _oldest(sizes: Sequence[int], total: int) -> list[int] | None:
    """The oldest subset with that total in the shortest prefix that has one."""
    places = [place for place, size in enumerate(sizes) if 0 < size <= total]
    prefixes = _Prefixes([sizes[place] for place in places])
    end = prefixes.shortest(total, len(places))
    if end is None:
        return None
    chosen: list[int] = []
    while total:  # the newest of the first `end` is needed, and so are all that are newer than one that may be left out
        stop = prefixes.newest_left_out(total, end)
        chosen += range(end - 1, stop, -1)
        total -= prefixes.sums[end] - prefixes.sums[stop + 1]
        end = prefixes.shortest(total, stop) or 0
    return [places[index] for index in reversed(chosen)]


class _Prefixes:
    """The first groups of a queue, for every number of them: which totals some of them have."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sums = [0, *accumulate(sizes)]
        self._places: dict[int, list[int]] = {}
        for place, size in enumerate(sizes):
            self._places.setdefault(size, []).append(place)

    def have(self, total: int, end: int) -> bool:
        """Whether some of the first `end` have that total together; that is, whether the others have the rest."""
        rest = self.sums[end] - total
        if total < 0 or rest < 0:
            return False
        least = min(total, rest)
        counts = {size: bisect_left(places, end) for size, places in self._places.items() if size <= least}
        return bool(reachable_totals(counts, least) >> least & 1)

    def shortest(self, total: int, end: int) -> int | None:
        """How many of the first `end` it takes to have that total; None if all of them don't."""
        low, step = bisect_left(self.sums, total, 0, end + 1), 1
        high = low
        while high < end and not self.have(total, high):
            low, high, step = high + 1, min(high + step, end), 2 * step
        if high > end or not self.have(total, high):
            return None
        return low + bisect_left(range(low, high), True, key=lambda at: self.have(total, at))

    def newest_left_out(self, total: int, end: int) -> int:
        """The newest of the first `end` that can be left out while all that are newer are taken; -1 if none can.

        Of groups of one size, the newer one can always be, if the older can.
        """
        newest = sorted(
            (places[count - 1] for places in self._places.values() if (count := bisect_left(places, end))), reverse=True
        )
        for place in newest:
            if self.have(total - (self.sums[end] - self.sums[place + 1]), place):
                return place
        return -1


def _oldest_that_fits(
    sizes: Sequence[int],
    envs: Sequence[str],
    batch_size: int,
    minimums: Mapping[str, int],
    waiting: Mapping[str, Mapping[int, int]],
) -> int | None:
    """Index of the oldest group that some batch of all that waits can hold without costing anyone's minimum."""
    hopeless = set()
    for index, (env, size) in enumerate(zip(envs, sizes, strict=True)):
        if (env, size) not in hopeless:
            counts = waiting.get(env, {})
            others = {**waiting, env: {**counts, size: counts.get(size, 0) - 1}}
            least = _less(minimums, env, size)
            alone = size == batch_size and not any(least.values())
            if alone or attainable(others, least, batch_size - size) == least:
                return index
            hopeless.add((env, size))
    return None


def _less(minimums: Mapping[str, int], env: str, size: int) -> dict[str, int]:
    """What is still to be given when `env` has given `size` sequences."""
    return {name: max(0, least - size) if name == env else least for name, least in minimums.items()}


def _heads(sizes: Sequence[int], envs: Sequence[str], minimums: Mapping[str, int]) -> set[int]:
    """Each environment's oldest groups, until they make up its minimum."""
    missing = dict(minimums)
    heads = set()
    for index, (size, env) in enumerate(zip(sizes, envs, strict=True)):
        if missing.get(env, 0) > 0:
            heads.add(index)
            missing[env] -= size
    return heads


def _exact(sizes: Sequence[int], envs: Sequence[str], batch_size: int, minimums: Mapping[str, int]) -> list[int] | None:
    """A batch that meets the minimums if there is one: first how much of each environment, then its oldest groups."""
    unit = math.gcd(*(size for size in sizes if 0 < size <= batch_size))
    if unit == 0 or batch_size % unit:
        return None
    rest = batch_size // unit
    lanes: dict[str, list[int]] = {env: [] for env in (OTHERS, *minimums)}
    for index, env in enumerate(envs):
        if 0 < sizes[index] <= batch_size:
            lanes[env if env in minimums else OTHERS].append(index)
    reach = 1
    reach_before, allowed = {}, {}
    for env, lane in lanes.items():
        reach_before[env] = reach
        totals = reachable_totals(Counter(sizes[index] // unit for index in lane), rest)
        allowed[env] = at_least_bits(totals, -(-minimums.get(env, 0) // unit))
        reach = totals_of_both(reach, allowed[env], rest)
    if not reach >> rest & 1:
        return None

    chosen: list[int] = []
    for env, lane in reversed(lanes.items()):
        shares = allowed[env] & complements(reach_before[env], rest)
        share = (shares & -shares).bit_length() - 1
        chosen += [lane[place] for place in _oldest([sizes[index] // unit for index in lane], share) or ()]
        rest -= share
    return sorted(chosen)

"""Which queued groups make the next batch. Pure; the FORM script commits the choice, or refuses it as a whole.

A batch holds exactly `batch_size` sequences and never splits a group. Groups are taken oldest first: the shortest
prefix of the queue that has a subset of the right total is found, and within it the oldest such subset. So a group
that is too large, or of a size that does not divide the batch, never blocks the others, and is used as soon as a
complement for it arrives.

An environment may be promised a minimum of every batch. How much of it the queue can give is worked out from the
numbers of queued groups by environment and size (`attainable`), so the queue is only read when there is a batch in it.

Where sizes differ, others might pass a group by again and again. So every 64th batch is made around the oldest group
that any batch can hold: no group waits for ever that could be trained.

Sets of totals are bitsets: bit s of an integer says that some of the groups have s sequences together. Adding a group
to those it was made of is one shift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

TURN_EVERY = 64  # steps
OTHERS = ""  # in place of an environment: all that have no minimum


def choose(sizes: Sequence[int], batch_size: int) -> list[int] | None:
    """Indices, in queue order, of the oldest groups that make a batch, or None if no batch can be made yet.

    `sizes` are the queued groups' numbers of sequences, oldest first.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: must be at least 1")
    return _oldest(sizes, batch_size)


def next_batch(
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
        chosen = choose_with_minimums(
            [sizes[index] for index in others],
            [envs[index] for index in others],
            batch_size - size,
            _less(minimums, env, size),
        )
        return None if chosen is None else sorted([oldest, *(others[place] for place in chosen)])
    return choose_with_minimums(sizes, envs, batch_size, minimums)


def choose_with_minimums(
    sizes: Sequence[int], envs: Sequence[str], batch_size: int, minimums: Mapping[str, int]
) -> list[int] | None:
    """Like `choose`, with at least `minimums[env]` sequences of each environment it names; None if that can't be.

    `envs` says whose the groups are. Three tries: the oldest batch; the oldest batch when each environment's oldest
    groups, up to its minimum, count as older than all others (upstream's two passes); any batch at all.
    """
    heads = _heads(sizes, envs, minimums)
    for order in (range(len(sizes)), sorted(range(len(sizes)), key=lambda index: index not in heads)):
        found = _oldest([sizes[index] for index in order], batch_size)
        if found is None:
            return None
        chosen = sorted(order[place] for place in found)
        if all(_taken(chosen, sizes, envs, env) >= minimum for env, minimum in minimums.items()):
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
    if not 0 < batch_size <= sum(map(_total, waiting.values())):
        return None
    totals = {env: _totals_of_counts(waiting.get(env, {}).items(), batch_size) for env in minimums}
    others = [item for env, counts in waiting.items() if env not in minimums for item in counts.items()]
    before = _totals_of_counts(others, batch_size)  # of the environments already settled, and those without a minimum
    after = [1]  # of those still to be settled
    for env in reversed(list(minimums)):
        after.append(_sums(after[-1], totals[env], batch_size))
    if not _sums(before, after.pop(), batch_size) >> batch_size & 1:
        return None
    met = {}
    for env, minimum in minimums.items():
        rest = _sums(before, after.pop(), batch_size)
        possible = max(total for total in _bits(totals[env]) if rest >> batch_size - total & 1)
        met[env] = min(minimum, possible)
        before = _sums(before, _at_least(totals[env], met[env]), batch_size)
    return met


def left_over(counts: Mapping[int, int], group_size: int) -> int:
    """Sequences of groups (`counts[size]` of each size) that remain when all that make up `group_size` are set aside."""
    left = dict(counts)
    while 0 < group_size <= _total(left):
        sizes = [size for size in sorted(left) for _ in range(min(left[size], group_size // size))]
        parts = Counter(sizes[index] for index in _oldest(sizes, group_size) or ())
        if not parts:
            break
        times = min(left[size] // count for size, count in parts.items())
        for size, count in parts.items():
            left[size] -= count * times
    return _total(left)


def _oldest(sizes: Sequence[int], total: int) -> list[int] | None:
    """The oldest subset with that total in the shortest prefix that has one."""
    within = (2 << total) - 1
    reach = 1
    reach_before: list[int] = []  # what the groups before each one can sum to
    for size in sizes:
        if reach >> total & 1:
            break
        reach_before.append(reach)
        if size > 0:
            reach |= (reach << size) & within
    if not reach >> total & 1:
        return None

    chosen: list[int] = []
    for index in range(len(reach_before) - 1, -1, -1):
        if total and not reach_before[index] >> total & 1:  # the older ones alone can't do it
            chosen.append(index)
            total -= sizes[index]
    return chosen[::-1]


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


def _taken(chosen: Sequence[int], sizes: Sequence[int], envs: Sequence[str], env: str) -> int:
    return sum(sizes[index] for index in chosen if envs[index] == env)


def _exact(sizes: Sequence[int], envs: Sequence[str], batch_size: int, minimums: Mapping[str, int]) -> list[int] | None:
    """A batch that meets the minimums if there is one: first how much of each environment, then its oldest groups."""
    lanes: dict[str, list[int]] = {env: [] for env in (OTHERS, *minimums)}
    for index, env in enumerate(envs):
        lanes[env if env in minimums else OTHERS].append(index)
    reach = 1
    reach_before, allowed = {}, {}
    for env, lane in lanes.items():
        reach_before[env] = reach
        totals = _totals_of_counts([(sizes[index], 1) for index in lane], batch_size)
        allowed[env] = _at_least(totals, minimums.get(env, 0))
        reach = _sums(reach, allowed[env], batch_size)
    if not reach >> batch_size & 1:
        return None

    chosen: list[int] = []
    rest = batch_size
    for env, lane in reversed(lanes.items()):
        share = min(total for total in _bits(allowed[env]) if total <= rest and reach_before[env] >> rest - total & 1)
        chosen += [lane[place] for place in _oldest([sizes[index] for index in lane], share) or ()]
        rest -= share
    return sorted(chosen)


def _totals_of_counts(counts: Iterable[tuple[int, int]], limit: int) -> int:
    """Totals up to `limit` of (size, number of groups). Powers of two of a number add up to every smaller number."""
    within = (2 << limit) - 1
    reach = 1
    for size, count in counts:
        if size < 1:
            continue
        left, part = min(count, limit // size), 1
        while left > 0:
            reach |= (reach << size * min(part, left)) & within
            left -= part
            part *= 2
    return reach


def _sums(some: int, others: int, limit: int) -> int:
    """Totals up to `limit` of one of `some` and one of `others`."""
    few, many = sorted((some, others), key=int.bit_count)
    reach = 0
    for total in _bits(few):
        reach |= many << total
    return reach & (2 << limit) - 1


def _total(counts: Mapping[int, int]) -> int:
    return sum(size * count for size, count in counts.items())


def _at_least(totals: int, minimum: int) -> int:
    return totals >> minimum << minimum


def _bits(totals: int) -> Iterator[int]:
    while totals:
        lowest = totals & -totals
        yield lowest.bit_length() - 1
        totals ^= lowest

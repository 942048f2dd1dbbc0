"""Which sums subsets of groups have, as bits of an integer: bit i is set where some subset has i sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

FEW = 64  # totals that are added one by one


def reachable_totals(counts: Mapping[int, int], limit: int, reach: int = 1) -> int:
    """Totals up to `limit` of any of `counts[size]` groups of each size, added to those in `reach`.

    Powers of two of a number add up to every smaller number.
    """
    within = (2 << limit) - 1
    for size, count in counts.items():
        left, part = min(count, limit // size), 1
        while left > 0:
            reach |= (reach << size * min(part, left)) & within
            left -= part
            part *= 2
    return reach


def totals_of_both(some: int, others: int, limit: int) -> int:
    """Totals up to `limit` of one of `some` and one of `others`.

    The number of ways to make each total is a convolution: exact, because it is rounded to less than half.
    """
    few, many = sorted((some, others), key=int.bit_count)
    if few.bit_count() <= FEW:
        reach = 0
        for total in _bits(few):
            reach |= many << total
        return reach & (2 << limit) - 1
    length = 2 << limit.bit_length()
    spectrum = np.fft.rfft(_flags(few, limit), length) * np.fft.rfft(_flags(many, limit), length)
    ways = np.fft.irfft(spectrum, length)[: limit + 1]
    return int.from_bytes(np.packbits(ways > 0.5, bitorder="little").tobytes(), "little")


def _flags(totals: int, limit: int) -> np.ndarray:
    """Of each total from 0 to `limit`: 1 if it is among them."""
    data = np.frombuffer(totals.to_bytes(limit // 8 + 1, "little"), np.uint8)
    return np.unpackbits(data, count=limit + 1, bitorder="little")


def complements(totals: int, whole: int) -> int:
    """What is missing to `whole` of each of the totals up to it."""
    return int(f"{totals & (2 << whole) - 1:0{whole + 1}b}"[::-1], 2)


def add_counts(counts: Iterable[Mapping[int, int]]) -> Counter[int]:
    together: Counter[int] = Counter()
    for each in counts:
        together.update(each)
    return together


def total_of(counts: Mapping[int, int]) -> int:
    return sum(size * count for size, count in counts.items())


def at_least_bits(totals: int, minimum: int) -> int:
    return totals >> minimum << minimum


def _bits(totals: int) -> Iterator[int]:
    while totals:
        lowest = totals & -totals
        yield lowest.bit_length() - 1
        totals ^= lowest

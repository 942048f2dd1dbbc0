"""Which queued groups make the next batch. Pure; the FORM script commits the choice, or refuses it as a whole.

A batch holds exactly `batch_size` sequences and never splits a group. Groups are taken oldest first: the shortest
prefix of the queue that has a subset of the right total is found, and within it the oldest such subset. So a group
that is too large, or of a size that does not divide the batch, never blocks the others, and is used as soon as a
complement for it arrives.
"""

from __future__ import annotations

from collections.abc import Sequence


def choose(sizes: Sequence[int], batch_size: int) -> list[int] | None:
    """Indices, in queue order, of the groups of the next batch, or None if no batch can be made yet.

    `sizes` are the queued groups' numbers of sequences, oldest first. Subset sum over a bitset: bit s of `reach` says
    that some subset of the groups so far has s sequences, so a step is one shift of a `batch_size`-bit integer.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: must be at least 1")
    wanted = 1 << batch_size
    within = (wanted << 1) - 1
    reach = 1
    reach_before: list[int] = []  # what the groups before each one can sum to
    for size in sizes:
        reach_before.append(reach)
        if size > 0:
            reach |= (reach << size) & within
        if reach & wanted:
            break
    else:
        return None

    chosen: list[int] = []
    rest = batch_size
    for index in range(len(reach_before) - 1, -1, -1):
        if rest and not reach_before[index] >> rest & 1:  # the older ones alone can't do it
            chosen.append(index)
            rest -= sizes[index]
    return chosen[::-1]

"""A step's sums over the replicas of one epoch, with what they tell each other of its groups."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lachesis.broker import Conflict
from lachesis.broker.records import BatchEntry
from lachesis.trainer.compute import Compute, to_bytes, to_tensor
from lachesis.trainer.reducer import Reducer, Watch


def sum_up(
    reducer: Reducer, batch: BatchEntry, compute: Compute, held: Mapping[int, bytes], watch: Watch
) -> tuple[list[Tensor], list[bytes]]:
    """The sums of all replicas, and what they tell of each group. `held`: this replica's groups, by their place.

    Raises Conflict if a group is not in the sums exactly once.
    """
    counts, sizes = (torch.zeros(len(batch.gids), dtype=torch.int64) for _ in range(2))
    for place, word in held.items():
        counts[place], sizes[place] = 1, len(word)
    reducer.sum([counts, sizes], watch)
    if not counts.eq(1).all():
        raise Conflict(
            f"step {batch.step}: its groups are in the replicas' sums {counts.tolist()} times; nothing was committed"
        )
    words = [torch.zeros(size, dtype=torch.uint8) for size in sizes.tolist()]
    for place, word in held.items():
        words[place] = to_tensor(word)
    told = torch.cat(words)
    sums = compute.reduce(reducer, told, watch)
    return sums, [to_bytes(word) for word in told.split(sizes.tolist())]


def digest(sums: Sequence[Tensor], told: Sequence[bytes]) -> str:
    """Equal where they are."""
    found = 0
    for tensor in sums:
        found = zlib.crc32(tensor.cpu().view(torch.uint8).numpy().data, found)
    for word in told:
        found = zlib.crc32(word, found)
    return f"{found:08x}"

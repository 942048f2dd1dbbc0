"""A step's sums over the replicas of one epoch, with what they tell each other of its groups."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lachesis.broker import Conflict
from lachesis.broker.records.steps import BatchEntry
from lachesis.trainer.elastic.accumulator import GradientAccumulator, to_bytes, to_tensor
from lachesis.trainer.elastic.claims import ClaimPolicy
from lachesis.trainer.elastic.collectives.base import Reducer, Watch

SLOT = 1024  # bytes for what is told of one group; where that is longer, it takes a sum of its own


def sum_over_replicas(
    reducer: Reducer,
    batch: BatchEntry,
    accumulator: GradientAccumulator,
    held: Mapping[int, bytes],
    claim_policy: ClaimPolicy,
    watch: Watch,
) -> tuple[list[Tensor], list[bytes]]:
    """The sums of all replicas, and what they tell of each group. `held`: this replica's groups, by their place.

    Raises Conflict if a group is not in the sums exactly once.
    """
    # of each group: how often it is there, how many bytes, the bytes; and of all replicas their pace
    everything = np.zeros((len(batch.gids) + 1, 2 + SLOT // 8), np.int64)
    told = everything[:-1]
    words = told[:, 2:].view(np.uint8)
    everything[-1, :2] = claim_policy.word
    for place, word in held.items():
        told[place, :2] = 1, len(word)
        if len(word) <= SLOT:
            words[place, : len(word)] = np.frombuffer(word, np.uint8)
    sums = accumulator.reduce(reducer, torch.from_numpy(everything), watch)
    claim_policy.hear(*everything[-1, :2].tolist())
    if not (told[:, 0] == 1).all():
        raise Conflict(
            f"step {batch.step}: its groups are in the replicas' sums {told[:, 0].tolist()} times; nothing was committed"
        )
    sizes = told[:, 1].tolist()
    long = {place: torch.zeros(size, dtype=torch.uint8) for place, size in enumerate(sizes) if size > SLOT}
    for place, whole in long.items():
        if place in held:
            whole[:] = to_tensor(held[place])
    if long:
        reducer.sum(list(long.values()), watch)
    return sums, [
        to_bytes(long[place]) if place in long else words[place, :size].tobytes() for place, size in enumerate(sizes)
    ]


def digest(sums: Sequence[Tensor], told: Sequence[bytes]) -> str:
    """Equal where they are."""
    found = 0
    for tensor in sums:
        found = zlib.crc32(tensor.cpu().view(torch.uint8).numpy().data, found)
    for word in told:
        found = zlib.crc32(word, found)
    return f"{found:08x}"

"""What replicas of one epoch exchange: a step's sums with what is told of its groups, and weights for one that lacks them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lachesis.broker import Conflict
from lachesis.broker.records import BatchEntry
from lachesis.trainer.compute import Compute
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
        words[place] = _to_tensor(word)
    told, sums = torch.cat(words), compute.sums()
    reducer.sum([*sums, told], watch)
    return sums, [_to_bytes(word) for word in told.split(sizes.tolist())]


def digest(sums: Sequence[Tensor], told: Sequence[bytes]) -> str:
    """Equal where they are."""
    found = 0
    for tensor in sums:
        found = zlib.crc32(tensor.view(torch.uint8).numpy().data, found)
    for word in told:
        found = zlib.crc32(word, found)
    return f"{found:08x}"


def give_weights(reducer: Reducer, compute: Compute, to: int, watch: Watch) -> None:
    header, tensors = compute.state()
    reducer.send([torch.tensor([len(header)])], to, watch)
    reducer.send([_to_tensor(header)], to, watch)
    reducer.send(tensors, to, watch)


def get_weights(reducer: Reducer, compute: Compute, source: int, watch: Watch) -> None:
    size = torch.zeros(1, dtype=torch.int64)
    reducer.receive([size], source, watch)
    raw = torch.zeros(int(size), dtype=torch.uint8)
    reducer.receive([raw], source, watch)
    header = _to_bytes(raw)
    tensors = compute.blank(header)
    reducer.receive(tensors, source, watch)
    compute.load(header, tensors)


def _to_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()

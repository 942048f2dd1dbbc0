"""One trainer over several processes. Rank 0 leads: it alone knows Redis and the disk; the others do as it does.

torchrun or Ray starts the processes and sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. What a rank computes with the
others, verl's engine does: parameters are sharded over them, gradients summed. Here is only what keeps them in step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# ranks wait for the leader's next order, and it waits for rollouts; a dead peer shows at once
RANK_TIMEOUT = timedelta(days=30)
LEADER = 0


def rank_of_this_process() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this trainer, as its launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """The processes of one trainer, once torch.distributed knows them. Values travel over gloo, in host memory."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=RANK_TIMEOUT) if self.size > 1 else None

    def order(self, command: Enum, *args: Any) -> None:
        """Rank 0 tells the others what comes next. Elsewhere, and of one rank, nothing."""
        if self._control is not None and self.rank == LEADER:
            dist.broadcast_object_list([command, args], src=LEADER, group=self._control)

    def next_order(self) -> tuple[Enum, tuple[Any, ...]]:
        """What rank 0 told; blocks. Raises RuntimeError if it is gone."""
        told: list[Any] = [None, None]
        dist.broadcast_object_list(told, src=LEADER, group=self._control)
        return told[0], told[1]

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks, of a tensor in host memory; in place."""
        if self._control is not None:
            dist.all_reduce(values, group=self._control)
        return values


def share(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split rows over `parts` ranks: as many rows each, up to one, and about as many tokens; verl's balancing.

    Args:
        lengths: tokens of each row.
    """
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    missing = -len(lengths) % parts
    found = get_seqlen_balanced_partitions([*lengths, *[0] * missing], k_partitions=parts, equal_size=True)
    return [sorted(row for row in part if row < len(lengths)) for part in found]


def init_process_group(device: str, backend: str) -> None:
    """Join the trainer's world, unless that is done already."""
    if dist.is_initialized():
        return
    if device != "cpu":
        getattr(torch, device).set_device(int(os.environ.get("LOCAL_RANK", "0")))
    named = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{backend}"
    if world_size() > 1:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # torchrun keeps its store when it starts the ranks again; in it lie the addresses of those that died
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
        dist.init_process_group(named, store=store, rank=rank, world_size=size)
    else:  # verl would ask for a port, which one process can do without
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs forget it
        dist.init_process_group(named, store=store, rank=0, world_size=1)

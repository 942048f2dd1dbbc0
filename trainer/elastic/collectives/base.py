"""Sums of tensors across the replicas of a policy, and their hand-over from one to another; of one epoch.

`Reducer` is all that the replica loop knows; gloo.py and nccl.py have one each, rendezvous.py makes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from lachesis.broker import LachesisError

BUCKET_BYTES = 64 << 20
OPERATION_POLL_S = 0.0005  # between two looks at whether an operation is done
CONNECT_TIMEOUT = timedelta(seconds=30)
REPLICA_TIMEOUT = timedelta(days=30)  # replicas that are done wait for those that are not; a dead one shows at once

Watch = Callable[[], None]  # called while something is waited for; raises what ends the waiting


class PeerLost(LachesisError, ConnectionError):
    """Another replica closed the connection, or can't be reached."""


class Reducer(Protocol):
    """The tensors given are contiguous, and alike in number, shape and dtype on all replicas; their device is their own affair."""

    device: torch.device  # where it works: tensors that are elsewhere are copied there and back

    def sum(self, tensors: Sequence[Tensor], watch: Watch) -> None:
        """Replace each tensor by its sum over all replicas, which all get bit for bit. Raises PeerLost."""

    def send(self, tensors: Sequence[Tensor], to: int, watch: Watch) -> None:
        """Hand tensors to the replica of that rank, which calls `receive`. Raises PeerLost."""

    def receive(self, tensors: Sequence[Tensor], source: int, watch: Watch) -> None:
        """Fill tensors with what the replica of that rank sends. Raises PeerLost."""

    def close(self) -> None:
        """Give the connections up. Another replica that waits for this one learns from its watch that the epoch is over."""


class Alone:
    """The reducer of a replica that has no peers."""

    device = torch.device("cpu")

    def sum(self, tensors: Sequence[Tensor], watch: Watch) -> None:
        watch()

    def send(self, tensors: Sequence[Tensor], to: int, watch: Watch) -> None:
        raise PeerLost(f"there is no replica of rank {to}")

    def receive(self, tensors: Sequence[Tensor], source: int, watch: Watch) -> None:
        raise PeerLost(f"there is no replica of rank {source}")

    def close(self) -> None:
        pass


def buckets(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of the tensors, of at most BUCKET_BYTES each: whoever works on one holds a copy of it."""
    flat = [tensor.view(-1) for tensor in tensors if tensor.numel()]
    return [part for tensor in flat for part in torch.split(tensor, max(1, BUCKET_BYTES // tensor.element_size()))]


def call_interruptibly(operation: Callable[[], None], watch: Callable[[], None]) -> None:
    """Run it in a thread, which is left to itself when `watch` raises. What it raises itself is lost: let it keep that."""
    thread = threading.Thread(target=operation, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.01)
        watch()

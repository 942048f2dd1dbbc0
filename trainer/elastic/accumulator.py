"""What one of several replicas (replica.py) needs of those who compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.broker.records.steps import BatchEntry, LedgerEntry, Membership
from lachesis.trainer.elastic.collectives.base import Reducer, Watch


class GradientAccumulator(Protocol):
    """What one replica computes and shares. Sums are of all that it has accumulated, over all replicas."""

    def connect(self, me: Membership, rank: int, world: int) -> None:
        """The replicas of this epoch are connected; this one is the rank-th of `world` of them. Raises PeerLost, Moved."""

    def disconnect(self) -> None:
        """They are no longer."""

    def accumulate(self, batch: BatchEntry, claimed: Sequence[tuple[int, Group]]) -> list[bytes]:
        """Add groups of the batch, each with its place in it, to the sums. Returns what all replicas are to know of each."""

    def reduce(self, reducer: Reducer, told: Tensor, watch: Watch) -> list[Tensor]:
        """A copy of the sums, and `told`, summed over the replicas; `told` in place. Raises PeerLost, and what `watch` does."""

    def clear(self) -> None:
        """Forget the sums."""

    def apply(self, batch: BatchEntry, sums: Sequence[Tensor], told: Sequence[bytes]) -> None:
        """Make one optimizer step of all replicas' sums; its own are cleared. `told`: of each group, in their order."""

    def entry(
        self, batch: BatchEntry, before: int, sums: Sequence[Tensor], told: Sequence[bytes]
    ) -> tuple[LedgerEntry, Sequence[DeadEntry]]:
        """What the ledger says of the step, and sequences that were left out of it. `before`: the step before it.

        `replica` and `seconds` are the caller's to fill in.
        """

    def send_state(self, reducer: Reducer, to: int, watch: Watch) -> None:
        """Send the replica of that rank all that decides what later steps do: weights, optimizer, schedule."""

    def receive_state(self, reducer: Reducer, source: int, watch: Watch) -> None:
        """Take that over from the replica of that rank."""


class LocalAccumulator(ABC):
    """A GradientAccumulator of one process: what it shares is a few contiguous tensors."""

    def connect(self, me: Membership, rank: int, world: int) -> None:  # noqa: B027  the caller's reducer is all it needs
        pass

    def disconnect(self) -> None:  # noqa: B027
        pass

    @abstractmethod
    def sums(self, device: torch.device) -> list[Tensor]:
        """A copy of the sums so far, zeros before the first group; alike in shape and dtype on all replicas.

        Best on that device, on which they will be summed.
        """

    @abstractmethod
    def state(self) -> tuple[bytes, list[Tensor]]:
        """What `send_state` sends, and what `blank` needs to know of it."""

    @abstractmethod
    def blank(self, header: bytes) -> list[Tensor]:
        """Tensors to receive another replica's state in."""

    @abstractmethod
    def load(self, header: bytes, tensors: Sequence[Tensor]) -> None:
        """Take over another replica's state. The tensors passed may be kept."""

    def reduce(self, reducer: Reducer, told: Tensor, watch: Watch) -> list[Tensor]:
        sums = self.sums(reducer.device)
        reducer.sum([*sums, told], watch)
        return sums

    def send_state(self, reducer: Reducer, to: int, watch: Watch) -> None:
        header, tensors = self.state()
        reducer.send([torch.tensor([len(header)])], to, watch)
        reducer.send([to_tensor(header)], to, watch)
        reducer.send(tensors, to, watch)

    def receive_state(self, reducer: Reducer, source: int, watch: Watch) -> None:
        size = torch.zeros(1, dtype=torch.int64)
        reducer.receive([size], source, watch)
        raw = torch.zeros(int(size), dtype=torch.uint8)
        reducer.receive([raw], source, watch)
        header = to_bytes(raw)
        tensors = self.blank(header)
        reducer.receive(tensors, source, watch)
        self.load(header, tensors)


def to_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()

"""The reducer over host memory: gloo's rings over TCP. A replica on an accelerator copies what it shares, once per step."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from lachesis.trainer.elastic.collectives.base import (
    CONNECT_TIMEOUT,
    OPERATION_POLL_S,
    REPLICA_TIMEOUT,
    PeerLost,
    Watch,
    buckets,
    call_interruptibly,
)

SMALL_BYTES = 64 << 10  # what each gets from each and adds up itself: one turn of the ring less than a sum has
ALIGNED = 8


class GlooReducer:
    """A Reducer (see base.py) of tensors in host memory, between addresses that all replicas reach."""

    def __init__(self, address: str) -> None:
        self.device = torch.device("cpu")
        self._address = address
        self._group: Any = None
        self._under_way: list[Any] = []
        self._transferring = False

    def connect(self, store: dist.Store, rank: int, world: int) -> None:  # type: ignore[name-defined]
        """Connect with all others. Raises RuntimeError, after CONNECT_TIMEOUT, where one does not come."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs forget it
        options._timeout = CONNECT_TIMEOUT
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address)]
        self._group = dist.ProcessGroupGloo(store, rank, world, options)

    def sum(self, tensors: Sequence[Tensor], watch: Watch) -> None:
        options, gather = dist.AllreduceOptions(), AllgatherOptions()
        options.reduceOp, options.timeout = dist.ReduceOp.SUM, REPLICA_TIMEOUT  # type: ignore[assignment]  # nor this
        gather.timeout = REPLICA_TIMEOUT
        small = [tensor for tensor in tensors if 0 < tensor.nbytes <= SMALL_BYTES]
        large = [tensor for tensor in tensors if tensor.nbytes > SMALL_BYTES]
        mine = _together(small)
        theirs = [torch.empty_like(mine) for _ in range(self._group.size())]
        under_way = [self._start(self._group.allgather, [theirs], [mine], gather)] if small else []
        under_way += [self._start(self._group.allreduce, [part], options) for part in buckets(large)]
        self._finish(under_way, watch)
        start = 0
        for tensor in small:
            end = start + tensor.nbytes
            tensor.zero_()
            for one in theirs:  # on all replicas in the same order: to the same bits
                tensor += one[start:end].view(tensor.dtype).view_as(tensor)
            start = end + -end % ALIGNED

    def send(self, tensors: Sequence[Tensor], to: int, watch: Watch) -> None:
        self._transfer([self._start(self._group.send, [part], to, 0) for part in buckets(tensors)], watch)

    def receive(self, tensors: Sequence[Tensor], source: int, watch: Watch) -> None:
        self._transfer([self._start(self._group.recv, [part], source, 0) for part in buckets(tensors)], watch)

    def close(self) -> None:
        """Where something is under way it stays until that fails, as it does when its peer is gone.

        Gloo can neither be interrupted, nor destroyed while it waits for a peer: both would wait too, and hold the
        interpreter's lock meanwhile. So what a silent peer keeps is kept for good: some threads and sockets.
        """
        group, self._group = self._group, None
        if not all(work.is_completed() for work in self._under_way) or self._transferring:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))

    @staticmethod
    def _start(operation: Callable[..., Any], *args: Any) -> Any:
        try:
            return operation(*args)
        except RuntimeError as error:
            raise PeerLost(f"a replica is gone: {error}") from error

    def _finish(self, under_way: list[Any], watch: Watch) -> None:
        self._under_way = under_way
        for work in under_way:
            while not work.is_completed():
                watch()
                time.sleep(OPERATION_POLL_S)
            try:
                work.wait()
            except RuntimeError as error:
                raise PeerLost(f"a replica is gone: {error}") from error

    def _transfer(self, under_way: list[Any], watch: Watch) -> None:
        """Of these, gloo tells that they are done only to who waits for it."""
        failed: list[RuntimeError] = []

        def finish() -> None:
            try:
                for work in under_way:
                    work.wait(REPLICA_TIMEOUT)
            except RuntimeError as error:
                failed.append(error)

        self._transferring = True
        call_interruptibly(finish, watch)
        self._transferring = False
        if failed:
            raise PeerLost(f"a replica is gone: {failed[0]}") from failed[0]


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Their bytes, each from a multiple of ALIGNED on."""
    parts = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    padding = [torch.zeros(-len(part) % ALIGNED, dtype=torch.uint8) for part in parts]
    return (
        torch.cat([piece for pair in zip(parts, padding, strict=True) for piece in pair]) if parts else torch.empty(0)
    )

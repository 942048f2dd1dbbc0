"""The reducer over device memory: NCCL between replicas that have a GPU each.

A kernel that waits for a dead peer ends in no way but an abort of its communicator, so that is made non-blocking, and is
aborted as soon as `watch` raises. torch's own watchdog, which would end the process, is told to clean up only: what it
finds, `get_error` tells. (PyTorch: "ProcessGroupNCCL environment variables"; NCCL: "Fault tolerance", ncclCommAbort.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ErrorType

from lachesis.broker.errors import ConfigurationError
from lachesis.trainer.elastic.collectives.base import (
    CONNECT_TIMEOUT,
    OPERATION_POLL_S,
    REPLICA_TIMEOUT,
    PeerLost,
    Watch,
    buckets,
)

CLEAN_UP_ONLY = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_BLOCKING_WAIT": "0"}


class NcclReducer:
    """A Reducer (see base.py) of tensors on `device`; those in host memory go there and back, bucket by bucket."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._group: Any = None
        os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", f"{CONNECT_TIMEOUT.total_seconds():.0f}")

    def connect(self, store: dist.Store, rank: int, world: int) -> None:  # type: ignore[name-defined]
        """Connect with all others. Raises ConfigurationError where a lower rank has the same GPU, RuntimeError where it fails."""
        mine = str(torch.cuda.get_device_properties(self.device).uuid)
        store.set(f"gpu:{rank}", mine)
        for other in range(rank):
            if store.get(f"gpu:{other}").decode() == mine:
                raise ConfigurationError(
                    f"lachesis.elastic_over = 'nccl': replicas {other} and {rank} both have GPU {mine}, and NCCL wants one "
                    "for each (CUDA_VISIBLE_DEVICES says which); use gloo where they share one"
                )
        options = dist.ProcessGroupNCCL.Options()
        options.config.blocking, options._timeout = 0, REPLICA_TIMEOUT
        with _environment(CLEAN_UP_ONLY):  # read when a group is made
            self._group = dist.ProcessGroupNCCL(store, rank, world, options)
        self._group.eager_connect_single_device(self.device)
        self._run([torch.zeros(1, device=self.device)], self._sum, lambda: None)  # which connects it really

    def sum(self, tensors: Sequence[Tensor], watch: Watch) -> None:
        self._run(tensors, self._sum, watch)

    def send(self, tensors: Sequence[Tensor], to: int, watch: Watch) -> None:
        self._run(tensors, lambda part: self._group.send([part], to, 0), watch)

    def receive(self, tensors: Sequence[Tensor], source: int, watch: Watch) -> None:
        self._run(tensors, lambda part: self._group.recv([part], source, 0), watch)

    def close(self) -> None:
        """Also ends what is under way, on this side."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _sum(self, part: Tensor) -> Any:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]  # torch's stubs forget it
        return self._group.allreduce([part], options)

    def _run(self, tensors: Sequence[Tensor], operation: Callable[[Tensor], Any], watch: Watch) -> None:
        for part in chain.from_iterable([one] if one.device == self.device else buckets([one]) for one in tensors):
            with torch.cuda.device(self.device):
                there = part.to(self.device)
                done = torch.cuda.Event()
                try:
                    operation(there).wait()  # this stream waits, not this thread
                except RuntimeError as error:
                    raise PeerLost(f"a replica is gone: {error}") from error
                done.record()
                while not done.query():
                    watch()
                    time.sleep(OPERATION_POLL_S)
                # after an error the kernel ends when torch aborts it, and the error stands there before that
                if (found := self._group.get_error()) != ErrorType.SUCCESS:
                    raise PeerLost(f"a replica is gone: NCCL reports {found.name}")
                if there is not part:
                    part.copy_(there)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

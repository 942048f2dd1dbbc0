"""Sums of tensors across the replicas of a policy, and their hand-over from one to another; of one epoch.

`Reducer` is all that the replica loop knows. Gloo works on host memory: a replica on an accelerator copies what it
shares, once per step. An NCCL reducer would implement the same three methods on device memory; it has to create its
communicator non-blocking and abort it when `watch` raises, because a kernel that waits for a dead peer ends in no other
way.
"""

from __future__ import annotations

import ctypes
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from lachesis.broker import BlockingBroker, LachesisError
from lachesis.broker.records import Membership

BUCKET_BYTES = 64 << 20
LOOK_S = 0.0005  # between two looks at whether an operation is done
CONNECT = timedelta(seconds=30)
IDLE = timedelta(days=30)  # replicas that are done wait for those that are not; a dead one shows at once

Watch = Callable[[], None]  # called while something is waited for; raises what ends the waiting


class PeerLost(LachesisError, ConnectionError):
    """Another replica closed the connection, or can't be reached."""


class Reducer(Protocol):
    """The tensors given are contiguous, in host memory, and alike in number, shape and dtype on all replicas."""

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

    def sum(self, tensors: Sequence[Tensor], watch: Watch) -> None:
        watch()

    def send(self, tensors: Sequence[Tensor], to: int, watch: Watch) -> None:
        raise PeerLost(f"there is no replica of rank {to}")

    def receive(self, tensors: Sequence[Tensor], source: int, watch: Watch) -> None:
        raise PeerLost(f"there is no replica of rank {source}")

    def close(self) -> None:
        pass


class GlooReducer:
    """Gloo's rings over TCP between replicas of rank 0 to world - 1, who find each other through Redis."""

    def __init__(
        self, broker: BlockingBroker, me: Membership, rank: int, world: int, watch: Watch, *, shard: int = 0
    ) -> None:
        """Connect all to all: of each replica that process which holds this shard. Raises PeerLost and what `watch` raises."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs forget it
        options._timeout = CONNECT
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(broker.broker.url))]
        store = MeetingStore(broker, me, shard)
        made: list[Any] = []

        def connect() -> None:
            try:
                made.append(dist.ProcessGroupGloo(store, rank, world, options))
            except BaseException as error:  # it belongs to the caller, who may not be waiting any more
                made.append(error)

        try:
            _watched(connect, watch)
        except BaseException:
            store.over = True  # which ends the thread
            raise
        if isinstance(made[0], BaseException):
            watch()
            raise PeerLost(f"replicas can't connect: {made[0]}") from made[0]
        self._group = made[0]
        self._under_way: list[Any] = []
        self._transferring = False

    def sum(self, tensors: Sequence[Tensor], watch: Watch) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp.SUM, IDLE  # type: ignore[assignment]  # nor this
        self._finish([self._start(self._group.allreduce, [part], options) for part in _buckets(tensors)], watch)

    def send(self, tensors: Sequence[Tensor], to: int, watch: Watch) -> None:
        self._transfer([self._start(self._group.send, [part], to, 0) for part in _buckets(tensors)], watch)

    def receive(self, tensors: Sequence[Tensor], source: int, watch: Watch) -> None:
        self._transfer([self._start(self._group.recv, [part], source, 0) for part in _buckets(tensors)], watch)

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
                time.sleep(LOOK_S)
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
                    work.wait(IDLE)
            except RuntimeError as error:
                failed.append(error)

        self._transferring = True
        _watched(finish, watch)
        self._transferring = False
        if failed:
            raise PeerLost(f"a replica is gone: {failed[0]}") from failed[0]


def _watched(operation: Callable[[], None], watch: Watch) -> None:
    """Run it in a thread, which is left to itself when `watch` raises: it can't be interrupted."""
    thread = threading.Thread(target=operation, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.01)
        watch()


class MeetingStore(dist.Store):  # type: ignore[name-defined]
    """What gloo needs to make its connections: a few keys, in the hash of the epoch's meeting."""

    def __init__(self, broker: BlockingBroker, me: Membership, shard: int) -> None:
        super().__init__()
        self._broker, self._me, self._shard = broker, me, shard
        self.over = False  # nobody waits any more for what it is to connect

    def set(self, key: str, value: bytes | str) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self._broker.call(self._broker.broker.members.leave_word, self._me, self._name(key), raw)

    def get(self, key: str) -> bytes:
        while (value := self._broker.call(self._broker.broker.members.word, self._me, self._name(key))) is None:
            if self.over:
                raise PeerLost(f"epoch {self._me.epoch} is over")
            time.sleep(0.002)
        return value

    def wait(self, keys: Sequence[str], timeout: timedelta = CONNECT) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        words = [self._broker.call(self._broker.broker.members.word, self._me, self._name(key)) for key in keys]
        return None not in words

    def _name(self, key: str) -> str:
        return f"{self._shard}:{key}"

    def set_timeout(self, timeout: timedelta) -> None:
        """The watch says how long to wait."""

    def has_extended_api(self) -> bool:
        return False


def address_towards(url: str) -> str:
    """The address under which this machine reaches Redis, and is reached by others that do."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or not parts.hostname:
        return "127.0.0.1"
    family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 6379, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _buckets(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of the tensors, of at most BUCKET_BYTES each: gloo holds a copy of what it works on."""
    flat = [tensor.view(-1) for tensor in tensors if tensor.numel()]
    return [part for tensor in flat for part in torch.split(tensor, max(1, BUCKET_BYTES // tensor.element_size()))]

"""Connects the replicas of an epoch, who find each other through Redis."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from lachesis.broker import BlockingBroker, LachesisError
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.steps import Membership
from lachesis.trainer.config.rules import Backend
from lachesis.trainer.elastic.collectives.base import CONNECT_TIMEOUT, PeerLost, Reducer, Watch, call_interruptibly
from lachesis.trainer.elastic.collectives.gloo import GlooReducer
from lachesis.trainer.elastic.collectives.nccl import NcclReducer


def connect(
    backend: Backend, broker: BlockingBroker, me: Membership, rank: int, world: int, watch: Watch, *, shard: int = 0
) -> Reducer:
    """Connect ranks 0 to world - 1, all to all: of each replica that process which holds this shard.

    Raises PeerLost, what `watch` raises, and ConfigurationError if their ways don't fit together.
    """
    found: GlooReducer | NcclReducer
    if backend == "gloo":
        found = GlooReducer(address_towards(broker.broker.url))
    else:
        found = NcclReducer(torch.device("cuda", torch.cuda.current_device()))
    store = RendezvousStore(broker, me, shard)
    failed: list[BaseException] = []

    def meet() -> None:
        try:
            store.set(f"over:{rank}", backend)
            for other in range(rank):
                if (theirs := store.get(f"over:{other}").decode()) != backend:
                    raise ConfigurationError(
                        f"lachesis.elastic_over = {backend!r}, and of replica {other} it is {theirs!r}: must be the same"
                    )
            found.connect(store, rank, world)
        except BaseException as error:  # it belongs to the caller, who may not be waiting any more
            failed.append(error)

    try:
        call_interruptibly(meet, watch)
    except BaseException:
        store.backend = True  # which ends the thread
        found.close()
        raise
    if failed:
        found.close()
        if isinstance(failed[0], LachesisError):
            raise failed[0]
        watch()
        raise PeerLost(f"replicas can't connect: {failed[0]}") from failed[0]
    return found


class RendezvousStore(dist.Store):  # type: ignore[name-defined]
    """What gloo and NCCL need to make their connections: a few keys, in the hash of the epoch's meeting."""

    def __init__(self, broker: BlockingBroker, me: Membership, shard: int) -> None:
        super().__init__()
        self._broker, self._me, self._shard = broker, me, shard
        self.backend = False  # nobody waits any more for what it is to connect

    def set(self, key: str, value: bytes | str) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self._broker.call(self._broker.broker.members.put_address, self._me, self._name(key), raw)

    def get(self, key: str) -> bytes:
        while (value := self._broker.call(self._broker.broker.members.get_address, self._me, self._name(key))) is None:
            if self.backend:
                raise PeerLost(f"epoch {self._me.epoch} is over")
            time.sleep(0.002)
        return value

    def wait(self, keys: Sequence[str], timeout: timedelta = CONNECT_TIMEOUT) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        words = [self._broker.call(self._broker.broker.members.get_address, self._me, self._name(key)) for key in keys]
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

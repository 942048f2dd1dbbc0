"""The fabric: what a run is in Redis, and all that may be done with it. No torch, no HTTP.

Read client.py first: a `Broker` is all of one run. Below it lie replicas, queue, retention, weights and run,
then records and store; above it archive and audit. The client is imported when it is first named, so that `--help` and
settings need not wait for redis-py and numpy.
"""

from typing import TYPE_CHECKING, Any

from lachesis.broker.errors import (
    ConfigurationError,
    Conflict,
    InvalidGroup,
    LachesisError,
    LeaseLost,
    RedisUnreachable,
    RedisUnsuitable,
    StorageError,
    WeightsRefused,
)
from lachesis.broker.store.embedded import EmbeddedRedis

if TYPE_CHECKING:
    from lachesis.broker.client import BlockingBroker, Broker, connect_blocking

__all__ = [
    "BlockingBroker",
    "Broker",
    "ConfigurationError",
    "Conflict",
    "EmbeddedRedis",
    "InvalidGroup",
    "LachesisError",
    "LeaseLost",
    "RedisUnreachable",
    "RedisUnsuitable",
    "StorageError",
    "WeightsRefused",
    "connect_blocking",
]


def __getattr__(name: str) -> Any:
    if name in ("BlockingBroker", "Broker", "connect_blocking"):
        from lachesis.broker import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

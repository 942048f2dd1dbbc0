"""The fabric: records, codec, keys, scripts and the client that every other room meets in. No torch; of HTTP
only what two rooms share, in `http`.

The client is imported when it is first named, so that `--help` and settings need not wait for redis-py and numpy.
"""

from typing import TYPE_CHECKING, Any

from lachesis.broker.embedded import EmbeddedRedis
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

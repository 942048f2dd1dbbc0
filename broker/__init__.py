"""The fabric: records, codec, keys, scripts and the client that every other room meets in. No torch, no HTTP."""

from lachesis.broker.client import BlockingBroker, Broker, connect_blocking
from lachesis.broker.embedded import EmbeddedRedis
from lachesis.broker.errors import (
    ConfigurationError,
    Conflict,
    InvalidGroup,
    LachesisError,
    LeaseLost,
    RedisUnreachable,
    RedisUnsuitable,
    WeightsRefused,
)

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
    "WeightsRefused",
    "connect_blocking",
]

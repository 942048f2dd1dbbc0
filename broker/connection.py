"""Connecting to Redis, with redis-py's traps closed.

redis-py resends a command whose reply was lost, so every write of the broker is idempotent. Its default read timeout
of 5 s would break blocking reads, so those have a connection pool of their own without one; and as blocking readers
would starve other callers of connections, commands never share a pool with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from lachesis.broker.errors import ConfigurationError, RedisUnreachable, RedisUnsuitable

# redis-py annotates every reply as bytes or str or None; ours are bytes, and checked where they enter records
Redis: TypeAlias = Any

OLDEST = (7, 0)
# how often a command is sent again, at most a second apart: a restart of Redis shorter than this is invisible to callers.
# Behind a Unix socket is the embedded server, which is back at once, or gone for good with the process that ran it.
RESENDS = 30
RESENDS_EMBEDDED = 12


def open_redis(url: str, *, blocking_reads: bool = False, retry: bool = True, connections: int = 64) -> Redis:
    """A client with its own pool. `retry=False` makes the first failure final, as a first connection should be."""
    resends = RESENDS_EMBEDDED if url.startswith("unix:") else RESENDS
    common: dict[str, Any] = {
        "protocol": 2,
        "max_connections": connections,
        "timeout": 20,  # seconds to wait for a free connection of the pool
        "socket_connect_timeout": 5,
        "socket_timeout": None if blocking_reads else 15,
        "retry": Retry(ExponentialBackoff(cap=1.0, base=0.02), resends if retry else 0),
    }
    if not url.startswith("unix:"):
        common["socket_keepalive"] = True
    try:
        return redis_asyncio.Redis.from_pool(redis_asyncio.BlockingConnectionPool.from_url(url, **common))
    except ValueError as error:
        raise ConfigurationError(
            f"redis_url = {hide_password(url)!r}: {error}; use redis://host:port/0 or unix:///path"
        ) from None


async def check_server(url: str) -> None:
    """Raise RedisUnreachable or RedisUnsuitable unless a server answers that can keep what it accepts."""
    shown = hide_password(url)
    redis = open_redis(url, retry=False, connections=1)
    try:
        info = await redis.info()
    except (RedisError, OSError) as error:
        reason = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
        # redis-py reports a handshake that the server refused as a lost connection, caused by the refusal
        if isinstance(error.__cause__ or error, (AuthenticationError, ResponseError)):
            raise RedisUnreachable(
                f"Redis at {shown} refuses us ({reason}): check user and password in --redis-url"
            ) from None
        raise RedisUnreachable(
            f"no Redis answers at {shown} ({reason}). Start one (redis-server --appendonly yes), correct --redis-url, or use --embedded"
        ) from None
    finally:
        await redis.aclose()
    check_info(info, shown)


def check_info(info: Mapping[str, object], shown: str) -> None:
    """Raise RedisUnsuitable if the server at `shown`, by what INFO says of it, can't keep what it accepts."""
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise RedisUnsuitable(f"Redis at {shown} is version {version}; Lachesis needs 7.0 or newer (or Valkey)")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        raise RedisUnsuitable(
            f"Redis at {shown} has maxmemory-policy {policy}, which would silently delete rollouts; set it to noeviction"
        )


def hide_password(url: str) -> str:
    """The URL as it may be shown: its password replaced by ***."""
    parts = urlsplit(url)
    if not parts.password:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))

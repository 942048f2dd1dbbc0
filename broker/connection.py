"""Connecting to Redis, with redis-py's traps closed.

redis-py sends a command again when its reply was lost, so every write of the broker is idempotent. How often it does so
says nothing of how long that takes, so here it is the time that is bounded. A blocking read longer than the socket's
timeout would never end well, so long waits are made of short ones. And each kind of use has a pool of its own: blocking
readers can't starve commands of connections, and neither can starve the heartbeats that keep leases and locks alive.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit, urlunsplit

from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from lachesis.broker.errors import ConfigurationError

# redis-py annotates every reply as bytes or str or None; ours are bytes, and checked where they enter records
Redis: TypeAlias = Any
T = TypeVar("T")

# seconds for which commands are sent again: a restart of Redis shorter than this is invisible to callers.
# Behind a Unix socket is the embedded server, which is back at once, or gone for good with the process that ran it.
PATIENCE_S = 30.0
PATIENCE_EMBEDDED_S = 8.0
ANSWER_S = 15.0  # a server that says nothing for so long has failed
BLOCK_S = 5.0  # the longest blocking read: well below ANSWER_S, as Redis may overrun it
COMMANDS = 64  # connections of a pool
HEARTBEATS = 4  # heartbeats are few and quick


class Patience(Retry):
    """Send again for so many seconds from the first failure on, a second apart at most."""

    def __init__(self, seconds: float) -> None:
        super().__init__(ExponentialBackoff(cap=1.0, base=0.02), retries=-1)
        self._seconds = seconds

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[[Exception], Any] | Callable[[Exception, int], Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        failed_at: float | None = None

        async def attempt() -> T:
            try:
                return await do()
            except RuntimeError as error:  # uvloop's, for a connection that was closed just before it was written to
                if "handler is closed" in str(error):
                    raise RedisConnectionError(str(error)) from error
                raise

        def again(error: Exception) -> bool:
            nonlocal failed_at
            now = time.monotonic()
            failed_at = now if failed_at is None else failed_at
            return now - failed_at < self._seconds and (is_retryable is None or is_retryable(error))

        return await super().call_with_retry(attempt, fail, again, with_failure_count)


def open_redis(url: str, *, connections: int = COMMANDS, patience_s: float | None = None) -> Redis:
    """A client with its own pool. `patience_s`: seconds for which commands are sent again, else as long as the module says."""
    if patience_s is None:
        patience_s = PATIENCE_EMBEDDED_S if url.startswith("unix:") else PATIENCE_S
    options: dict[str, Any] = {
        "protocol": 2,
        "max_connections": connections,
        "timeout": 20,  # seconds to wait for a free connection of the pool
        "socket_connect_timeout": 5,
        "socket_timeout": ANSWER_S,
        "retry": Patience(patience_s),
    }
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    try:
        return redis_asyncio.Redis.from_pool(redis_asyncio.BlockingConnectionPool.from_url(url, **options))
    except ValueError as error:
        raise ConfigurationError(
            f"redis_url = {hide_password(url)!r}: {error}; use redis://host:port/0 or unix:///path"
        ) from None


async def wait_for_entries(
    redis: Redis, stream: str, after: str, timeout_s: float, *, count: int = 1
) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Up to `count` entries of `stream` newer than the id `after`, as soon as there is one; none after `timeout_s`.

    `redis` is the pool for blocking reads.
    """
    found = await wait_for_any(redis, {stream: after}, timeout_s, count=count)
    return found[0][1] if found else []


async def wait_for_any(
    redis: Redis, cursors: Mapping[str, str], timeout_s: float, *, count: int = 1
) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """(stream, up to `count` entries) of each stream that has entries newer than its cursor, as soon as one has."""
    until = time.monotonic() + timeout_s
    while True:
        left = until - time.monotonic()
        block = max(1, int(min(left, BLOCK_S) * 1000))  # 0 would be forever
        if found := await redis.xread(dict(cursors), count=count, block=block):
            streams: list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]] = found
            return streams
        if left <= BLOCK_S:
            return []


def hide_password(url: str) -> str:
    """The URL as it may be shown: its password replaced by ***."""
    parts = urlsplit(url)
    if not parts.password:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))

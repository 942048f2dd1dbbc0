"""Connecting to Redis, with redis-py's traps closed.

redis-py sends a command again when its reply was lost, so every write of the broker is idempotent. How often it does so
says nothing of how long that takes, so here it is the time that is bounded. A living server that refuses a command for
the moment is asked again as well, and one that is the master no more is left: see redis_errors.py. A blocking read longer
than the socket's timeout would never end well, so long waits are made of short ones. And each kind of use has a pool of
its own: blocking readers can't starve commands of connections, and neither can starve the heartbeats that keep leases and
locks alive.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import unquote_plus, urlsplit

from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.store.redis_errors import Trouble, trouble

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
SHOWN = (  # options of a URL that are no secrets
    *("db", "protocol", "username", "client_name", "timeout", "max_connections", "health_check_interval"),
    *("socket_timeout", "socket_connect_timeout", "socket_keepalive", "retry_on_timeout", "decode_responses"),
    *("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"),
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"[^:/?#@]*:")  # and what divides it from its password
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[^:/?#@\[\]]*)(:[0-9]{1,5})?([/#][^:]*)?")


class _Limit(NamedTuple):
    until: float  # of time.monotonic()
    unless: Callable[[], bool]
    forbidden: bool  # whether what Redis's user may not do is tried again, too


_limit: ContextVar[_Limit | None] = ContextVar("limit", default=None)


class patience:  # used as a function; a generator would cost each post several microseconds
    """Within this block commands are sent again for so many seconds from now on, in place of their pool's patience.

    Not if `unless` has come true; with `forbidden` also those that the user of Redis may not do.
    """

    __slots__ = ("_limit", "_token")

    def __init__(self, seconds: float, *, unless: Callable[[], bool] = lambda: False, forbidden: bool = False) -> None:
        self._limit = _Limit(time.monotonic() + seconds, unless, forbidden)

    def __enter__(self) -> None:
        self._token = _limit.set(self._limit)

    def __exit__(self, *_: object) -> None:
        _limit.reset(self._token)


class Patience(Retry):
    """Send again for so long from the first failure on, a second apart at most.

    `lost_s`: while there is no connection or no reply; `refused_s`: while a living server refuses. What it refuses for
    want of memory or by its users' rights goes to the caller at once. `leave` drops the connections that may lead to a
    server that is the master no more.
    """

    def __init__(self, lost_s: float, refused_s: float, leave: Callable[[], Awaitable[None]]) -> None:
        super().__init__(ExponentialBackoff(cap=1.0, base=0.02), retries=-1)
        self._lost_s, self._refused_s, self._leave = lost_s, refused_s, leave

    def __deepcopy__(
        self, _: dict[int, Any]
    ) -> Patience:  # redis-py copies it for each connection; nothing changes in it
        return self

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[[Exception], Any] | Callable[[Exception, int], Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        """What `do` returns in the end. `fail`, redis-py's, drops the connection it used; it is spared where it works."""
        failures, began = 0, 0.0
        while True:
            try:
                return await do()
            except (RedisError, OSError, RuntimeError) as error:
                kind, found = _classified(error)
                if kind is None:
                    raise
                failures, began = failures + 1, began or time.monotonic()
                if kind in (Trouble.LOST, Trouble.DEMOTED):
                    await (fail(found, failures) if with_failure_count else fail(found))  # type: ignore[call-arg]
                if kind is Trouble.DEMOTED:
                    await self._leave()
                if not self._goes_on(kind, began) or (is_retryable is not None and not is_retryable(found)):
                    raise found from error.__cause__
            await asyncio.sleep(self._backoff.compute(failures))

    def _goes_on(self, kind: Trouble, began: float) -> bool:
        limit, now = _limit.get(), time.monotonic()
        if kind is Trouble.FULL or (kind is Trouble.FORBIDDEN and not (limit and limit.forbidden)):
            return False
        if limit is not None:
            return now < limit.until and not limit.unless()
        return now - began < (self._lost_s if kind is Trouble.LOST else self._refused_s)


def _classified(error: Exception) -> tuple[Trouble | None, Exception]:
    if isinstance(error, RuntimeError) and "handler is closed" in str(error):
        return Trouble.LOST, RedisConnectionError(str(error))  # uvloop's, for a connection that was closed just before
    return trouble(error), error


def open_redis(
    url: str,
    *,
    connections: int = COMMANDS,
    patience_s: float | None = None,
    leave: Callable[[], Awaitable[None]] | None = None,
) -> Redis:
    """A client with its own pool.

    `patience_s`: seconds for which commands are sent again, else as long as the module says.
    `leave`: called when the server turns out to be the master no more; else this pool's connections are made anew.
    """
    lost_s = PATIENCE_EMBEDDED_S if url.startswith("unix:") else PATIENCE_S
    lost_s, refused_s = (lost_s, PATIENCE_S) if patience_s is None else (patience_s, patience_s)
    _check_url(url)

    async def leave_this() -> None:
        await reconnect(client)

    options: dict[str, Any] = {
        "protocol": 2,
        "max_connections": connections,
        "timeout": 20,  # seconds to wait for a free connection of the pool
        "socket_connect_timeout": 5,
        "socket_timeout": ANSWER_S,
        "retry": Patience(lost_s, refused_s, leave or leave_this),
    }
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    try:
        client = redis_asyncio.Redis.from_pool(redis_asyncio.BlockingConnectionPool.from_url(url, **options))
    except ValueError as error:
        raise ConfigurationError(
            f"redis_url = {hide_password(url)!r}: {error}; use redis://host:port/0 or unix:///path"
        ) from None
    try:
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except TypeError as error:  # it names the option
        raise ConfigurationError(f"redis_url = {hide_password(url)!r}: an option that there is not ({error})") from None
    return client


async def reconnect(redis: Redis) -> None:
    """Drop the connections of a client's pool: idle ones now, others when their command is done."""
    pool = redis.connection_pool
    await pool.update_active_connections_for_reconnect()
    await pool.disconnect(inuse_connections=False)


def _check_url(url: str) -> None:
    """Raise ConfigurationError for what redis-py would read as something else."""
    shown = hide_password(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its text may hold a part of the password
        raise ConfigurationError(
            f"redis_url = {shown!r}: it has no port number where one should be; a password in it is written with %2F for /, %3F for ?, %23 for # and %40 for @"
        ) from None
    database = parts.path.removeprefix("/")
    if parts.scheme in ("redis", "rediss") and database and not (database.isascii() and database.isdecimal()):
        raise ConfigurationError(f"redis_url = {shown!r}: its database, after the host, must be a number, e.g. 0")


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
    """The URL as it may be shown: *** in the place of all that may be a password. The less it is like a URL, the less is shown."""
    scheme = _SCHEME.match(url)
    start = scheme.end() if scheme else 0
    before, at, address = url[start:].rpartition("@")  # the last one: it may not be percent-encoded
    user = _USER.match(before)
    shown = url[:start] + (user[0] if user else "") + ("***@" if at else "")
    if at and "=" in before.partition("?")[2]:  # its @ may stand in an option
        return shown.removesuffix("@")
    address, mark, options = address.partition("?")
    if not _ADDRESS.fullmatch(address):  # a password without the host that should follow it
        address = address.partition(":")[0] + ":***"
    return shown + address + mark + "&".join(map(_hide_option, options.split("&")))


def _hide_option(option: str) -> str:
    name, mark, _ = option.partition("=")
    if not option or (mark and unquote_plus(name) in SHOWN):
        return option
    return f"{name}=***" if mark else "***"

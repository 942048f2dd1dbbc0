"""One connection that many callers share: commands go out as they come, replies are matched in order.

redis-py lends a connection for every command and handles each in Python, which takes several times what Redis takes to
execute it: too much for the scripts, of which every posted group needs two. redis-py still makes the connection: where
Redis is, TLS, user and database are its business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import hiredis
from redis._parsers import BaseParser
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from lachesis.broker.store.connection import Redis
from lachesis.broker.store.redis_errors import Trouble, describe, trouble

REPLY_S = 15.0  # a server that is silent for longer than this, while it owes a reply, is given up

Command = tuple[Any, ...]  # bytes, text, numbers


class MultiplexedConnection:
    """The shared connection to the server of one redis-py client, made when it is first needed, and again when lost."""

    def __init__(self, redis: Redis) -> None:
        self._pool, self._retry = redis.connection_pool, redis.get_retry()
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()

    async def call(self, *commands: Command) -> list[Any]:
        """The replies (bytes, integers, lists, None) to commands sent together. Raises the first error among them.

        As redis-py would do, it sends them again for as long as its client's Patience says: they must be idempotent.
        """
        packed = b"".join([_packed(command) for command in commands])
        replies = await self._retry.call_with_retry(lambda: self._once(packed, len(commands)), _again)
        return list(replies)

    async def aclose(self) -> None:
        self.drop(RedisConnectionError("closed"))

    def drop(self, error: Exception) -> None:
        """Close the connection, if there is one; what is owed a reply is sent again over the next."""
        if self._line:
            self._line.drop(error)

    async def _once(self, packed: bytes, count: int) -> list[Any]:
        line = self._line or await self._connect()
        replies = await line.send(packed, count)
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                error = BaseParser.parse_error(str(reply))
                if trouble(error) is Trouble.DEMOTED:
                    line.drop(RedisConnectionError(describe(error)))
                raise error
        return replies

    async def _connect(self) -> _Line:
        async with self._connecting:
            if self._line is None:
                connection = self._pool.make_connection()
                connection.retry = Retry(NoBackoff(), 0)  # `call` tries again
                await connection.connect()
                self._line = _Line(connection, self._lost)
            return self._line

    def _lost(self, line: _Line) -> None:
        if self._line is line:  # it is told of more than once, and there may be another one by then
            self._line = None


def _packed(command: Command) -> bytes:
    words: Any = tuple([word if isinstance(word, bytes | str) else _text(word) for word in command])
    return bytes(hiredis.pack_command(words))


def _text(number: float) -> str:
    return str(int(number)) if isinstance(number, int) else repr(number)


async def _again(_: Exception) -> None:
    """Called by redis-py between two attempts: there is nothing to clean up."""


class _Owed(NamedTuple):
    caller: asyncio.Future[list[Any]]
    expected: int
    replies: list[Any]


class _Line(asyncio.Protocol):
    """A connection as redis-py made it, taken over."""

    def __init__(self, connection: Any, lost: Callable[[_Line], None]) -> None:
        self._lost = lost
        self._reader = hiredis.Reader()
        self._owed: deque[_Owed] = deque()
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self._writer = connection._writer  # kept: it closes what it owns when it is collected, and so does redis-py's
        connection._writer = connection._reader = None
        self._transport: asyncio.Transport = self._writer.transport
        self._transport.set_protocol(self)

    def send(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        """Write commands; the result is what replies to them, errors as values."""
        caller: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._transport.is_closing():
            caller.set_exception(RedisConnectionError("the connection was closed"))
            return caller
        if not self._owed:
            self._heard = self._loop.time()
            self._watch = self._watch or self._loop.call_later(REPLY_S, self._check)
        self._owed.append(_Owed(caller, count, []))
        self._transport.write(packed)
        return caller

    def drop(self, error: Exception) -> None:
        """Close, and let every caller know that its replies are lost."""
        self._lost(self)
        self._transport.abort()
        if self._watch:
            self._watch.cancel()
        while self._owed:
            if not (caller := self._owed.popleft().caller).done():
                caller.set_exception(error)

    def _check(self) -> None:
        silent = self._loop.time() - self._heard
        self._watch = None
        if self._owed and silent >= REPLY_S:
            self.drop(RedisTimeoutError(f"no reply for {silent:.0f} s"))
        elif self._owed:
            self._watch = self._loop.call_later(REPLY_S - silent, self._check)

    # -- asyncio.Protocol -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._reader.feed(data)
        while self._owed and (reply := self._reader.gets()) is not False:
            caller, expected, replies = self._owed[0]
            replies.append(reply)
            if len(replies) == expected:
                self._owed.popleft()
                if not caller.done():  # it was cancelled
                    caller.set_result(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop(RedisConnectionError(f"connection lost: {exc or 'closed by the server'}"))

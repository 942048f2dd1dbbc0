"""Who may call what over HTTP, whichever HTTP library asks: bearer tokens of one run, by role.

Clients that cannot set an Authorization header, as unmodified Atropos environments and trainers, put the token into
the URL they are given, http://x:TOKEN@host:port/runs/RUN, and their HTTP library makes Basic credentials of it. So the
password of Basic credentials counts as a token. Browsers are not asked for it: they would remember it, and send it
along with the requests of other sites' pages.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Collection
from contextlib import nullcontext, suppress
from typing import TypeAlias

from redis.exceptions import RedisError

from lachesis.broker.client import Broker
from lachesis.broker.errors import LachesisError
from lachesis.broker.records.registrations import Role, TokenRecord
from lachesis.broker.run.tokens import matching
from lachesis.broker.store.connection import patience
from lachesis.broker.store.redis_errors import trouble

TOKENS_FRESH_S = 5.0  # a revoked token is good for as long as this
REREAD_S = 0.1  # however many unknown tokens come, Redis is asked about them no more often
TOKENS_PATIENCE_S = 1.0  # who knows the tokens of before waits this long for a Redis in trouble

OPEN: tuple[Role, ...] = ()  # to everyone: no guard
ANY: tuple[Role, ...] = ("environment", "trainer", "admin")
ENVIRONMENT: tuple[Role, ...] = ("environment", "admin")
TRAINER: tuple[Role, ...] = ("trainer", "admin")
ADMIN: tuple[Role, ...] = ("admin",)

Seen: TypeAlias = dict[str, set[str]]


class Denied(LachesisError, PermissionError):
    """401 who are you, with a challenge for the header WWW-Authenticate; 403 not with that role."""

    def __init__(self, status: int, message: str, challenge: str = "") -> None:
        self.status, self.challenge = status, challenge
        super().__init__(message)

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": self.challenge} if self.challenge else {}


class Access:
    """The tokens of one run. A run that never had one is open, unless `required`.

    While Redis is in trouble the tokens known last go on to count; where none were read yet nobody is let in. And what
    was once seen stays so, whatever Redis holds later: an emptied or restored one opens no run and revives no token.
    `seen` is where that is kept: by run, the digests of its revoked tokens.
    """

    def __init__(self, broker: Broker, *, required: bool, seen: Seen | None = None) -> None:
        self._broker, self._required = broker, required
        self._seen: Seen = {} if seen is None else seen
        self._records: list[TokenRecord] = []
        self._read_at = float("-inf")
        self._rereading = asyncio.Lock()

    async def check(self, authorization: str, roles: Collection[Role]) -> TokenRecord | None:
        """The token of the header's sender, who has one of `roles`; None on an open run. Else raises Denied."""
        if time.monotonic() - self._read_at > TOKENS_FRESH_S:
            await self._read()
        if not self._required and self._broker.keys.run not in self._seen:
            return None
        token = presented(authorization)
        if token is None:
            raise self._unknown("a token is needed")
        record = matching(token, self._records)
        if record is None:  # perhaps made since
            await self._reread()
            record = matching(token, self._records)
        if record is None:
            raise self._unknown("this token is unknown or revoked")
        if record.role not in roles:
            needed = " or ".join(roles)
            raise Denied(403, f"this takes the role {needed}; the token {record.name!r} has {record.role}")
        return record

    async def prepare(self) -> None:
        """Read the tokens now: they are known then, should Redis be away when the first request comes."""
        with suppress(RedisError, OSError):
            await self._read()

    async def may_read(self, authorization: str) -> bool:
        """Whether the header's sender may be told of the run; not where Redis, which knows, can't be asked in a moment."""
        try:
            with patience(TOKENS_PATIENCE_S):
                await self.check(authorization, ANY)
        except (Denied, RedisError, OSError):
            return False
        return True

    async def _read(self) -> None:
        known = self._read_at > float("-inf")
        try:
            with patience(TOKENS_PATIENCE_S) if known else nullcontext():
                self._records = self._as_seen(await self._broker.tokens.all())
        except (RedisError, OSError) as error:
            if not known or trouble(error) is None:
                raise
        self._read_at = time.monotonic()

    def _as_seen(self, records: list[TokenRecord]) -> list[TokenRecord]:
        """Those that were never seen revoked."""
        if not records:
            return []
        revoked = self._seen.setdefault(self._broker.keys.run, set())
        revoked.update(record.sha256 for record in records if record.revoked_at is not None)
        return [record for record in records if record.sha256 not in revoked]

    async def _reread(self) -> None:
        """Read what was made up to now; those who ask for that together wait for one reading."""
        asked_at = time.monotonic()
        async with self._rereading:
            if self._read_at > asked_at:
                return
            await asyncio.sleep(self._read_at + REREAD_S - time.monotonic())
            await self._read()

    def _unknown(self, why: str) -> Denied:
        run = self._broker.keys.run
        rule = (
            f"run {run!r}: {why}. Send `Authorization: Bearer TOKEN`, or put it into the URL, http://x:TOKEN@host:port; "
            f"`lachesis token create --run {run} --role ROLE` makes one"
        )
        return Denied(401, rule, 'Bearer realm="lachesis"')


def presented(authorization: str) -> bytes | None:
    """The token in an Authorization header: a Bearer token, or the password of Basic credentials."""
    scheme, _, credentials = authorization.partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return credentials.encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None

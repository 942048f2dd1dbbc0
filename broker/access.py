"""Who may call what over HTTP, whichever HTTP library asks: bearer tokens of one run, by role.

Clients that cannot set an Authorization header, as unmodified Atropos environments and trainers, put the token into
the URL they are given, http://x:TOKEN@host:port/runs/RUN, and their HTTP library makes Basic credentials of it. So the
password of Basic credentials counts as a token. Browsers are not asked for it: they would remember it, and send it
along with the requests of other sites' pages.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Collection

from redis.exceptions import RedisError

from lachesis.broker.client import Broker
from lachesis.broker.errors import LachesisError
from lachesis.broker.records import Role, TokenRecord
from lachesis.broker.tokens import matching

REMEMBERED_S = 5.0  # a revoked token is good for as long as this

OPEN: tuple[Role, ...] = ()  # to everyone: no guard
ANY: tuple[Role, ...] = ("environment", "trainer", "admin")
ENVIRONMENT: tuple[Role, ...] = ("environment", "admin")
TRAINER: tuple[Role, ...] = ("trainer", "admin")
ADMIN: tuple[Role, ...] = ("admin",)


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

    While Redis is away nobody is let in; `outlast` has those known last let in who they let in before.
    """

    def __init__(self, broker: Broker, *, required: bool, outlast: bool = False) -> None:
        self._broker, self._required, self._outlast = broker, required, outlast
        self._records: list[TokenRecord] = []
        self._read_at = float("-inf")

    async def check(self, authorization: str, roles: Collection[Role]) -> None:
        """Return if the header's sender has one of `roles`, else raise Denied."""
        if time.monotonic() - self._read_at > REMEMBERED_S:
            await self._read()
        if not self._records and not self._required:
            return
        token = presented(authorization)
        if token is None:
            raise self._unknown("a token is needed")
        record = matching(token, self._records)
        if record is None:  # perhaps made since
            await self._read()
            record = matching(token, self._records)
        if record is None:
            raise self._unknown("this token is unknown or revoked")
        if record.role not in roles:
            needed = " or ".join(roles)
            raise Denied(403, f"this takes the role {needed}; the token {record.name!r} has {record.role}")

    async def _read(self) -> None:
        try:
            self._records = await self._broker.tokens.all()
        except (RedisError, OSError):
            if not (self._outlast and self._records):
                raise
        self._read_at = time.monotonic()

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

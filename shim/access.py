"""Who may call what: bearer tokens, checked before a request's body is read.

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

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lachesis.broker import Broker
from lachesis.broker.records import Role, TokenRecord
from lachesis.broker.tokens import matching

REMEMBERED_S = 5.0  # a revoked token is good for as long as this

OPEN: tuple[Role, ...] = ()  # to everyone: no guard
ANY: tuple[Role, ...] = ("environment", "trainer", "admin")
ENVIRONMENT: tuple[Role, ...] = ("environment", "admin")
TRAINER: tuple[Role, ...] = ("trainer", "admin")
ADMIN: tuple[Role, ...] = ("admin",)


class Access:
    """The tokens of one run. A run that never had one is open, unless `required`."""

    def __init__(self, broker: Broker, *, required: bool) -> None:
        self._broker, self._required = broker, required
        self._records: list[TokenRecord] = []
        self._read_at = float("-inf")

    async def check(self, headers: Headers, roles: Collection[Role]) -> None:
        """Return if the caller has one of `roles`, else raise HTTPException: 401 who are you, 403 not with that role."""
        if time.monotonic() - self._read_at > REMEMBERED_S:
            await self._read()
        if not self._records and not self._required:
            return
        token = presented(headers)
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
            raise HTTPException(403, f"this takes the role {needed}; the token {record.name!r} has {record.role}")

    async def _read(self) -> None:
        self._records = await self._broker.tokens.all()
        self._read_at = time.monotonic()

    def _unknown(self, why: str) -> HTTPException:
        run = self._broker.keys.run
        rule = (
            f"run {run!r}: {why}. Send `Authorization: Bearer TOKEN`, or put it into the URL, http://x:TOKEN@host:port; "
            f"`lachesis token create --run {run} --role ROLE` makes one"
        )
        return HTTPException(401, rule, headers={"WWW-Authenticate": 'Bearer realm="lachesis"'})


class Guard:
    """ASGI middleware of one route: lets through who has one of `roles`."""

    def __init__(self, app: ASGIApp, access: Access, roles: Collection[Role]) -> None:
        self._app, self._access, self._roles = app, access, roles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._access.check(Headers(scope=scope), self._roles)
        await self._app(scope, receive, send)


def presented(headers: Headers) -> bytes | None:
    """The token in a request's Authorization header: a Bearer token, or the password of Basic credentials."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return credentials.encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None

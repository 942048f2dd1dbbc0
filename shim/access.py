"""The tokens of broker/access.py before the shim's routes, checked before a request's body is read."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lachesis.broker.access import Access
from lachesis.broker.records import Role


class Guard:
    """ASGI middleware of one route: lets through who has one of `roles`."""

    def __init__(self, app: ASGIApp, access: Access, roles: Collection[Role]) -> None:
        self._app, self._access, self._roles = app, access, roles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._access.check(Headers(scope=scope).get("authorization", ""), self._roles)
        await self._app(scope, receive, send)

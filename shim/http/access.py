"""The tokens of service/http/access.py before the shim's routes, checked before a request's body is read; and whose is whose."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lachesis.broker import Broker
from lachesis.broker.records.registrations import EnvRecord, Role, TokenRecord
from lachesis.broker.run.environments import may_act_for
from lachesis.service.http.access import Access, Denied

CALLER = "lachesis.caller"  # key of the scope: the record of the token that the request came with


class Guard:
    """ASGI middleware of one route: lets through who has one of `roles`."""

    def __init__(self, app: ASGIApp, access: Access, roles: Collection[Role]) -> None:
        self._app, self._access, self._roles = app, access, roles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[CALLER] = await self._access.check(Headers(scope=scope).get("authorization", ""), self._roles)
        await self._app(scope, receive, send)


def caller_of(request: Request) -> TokenRecord | None:
    """The token that the request came with; None on an open run."""
    return request.scope.get(CALLER)


async def environment_of(broker: Broker, caller: TokenRecord | None, env_id: int) -> EnvRecord | None:
    """Note that the environment called, and return it; None if it is not registered. Denied where it is another token's."""
    env = await broker.registry.touch_env(env_id, by=caller)
    if env is not None and not may_act_for(caller, env):
        env = await broker.registry.env(env_id)  # what was known of it may be from before a reset
        check_owner(caller, env)
    return env


def check_owner(caller: TokenRecord | None, env: EnvRecord | None) -> None:
    """Raise Denied for an environment that was registered with another token."""
    if env is not None and not may_act_for(caller, env):
        raise Denied(403, f"env_id = {env.env_id}: was registered with another token, and only that one may act for it")


def account_of(caller: TokenRecord | None, env: EnvRecord | None, env_id: int | None) -> str:
    """What groups are counted under: their environment's id, and where a token's are no registered environment's, that token."""
    if caller is not None and env is None:
        return f"@{caller.name}"
    return "-" if env_id is None else str(env_id)

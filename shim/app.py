"""The ASGI application: its parts, made and joined here, and the table of routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lachesis.broker import Broker
from lachesis.shim.batches_out import BatchEndpoint, LatestExample
from lachesis.shim.errors import HANDLERS
from lachesis.shim.groups_in import GroupsIn
from lachesis.shim.parties import PartyRoutes
from lachesis.shim.pressure import HOLD_S, Hold
from lachesis.shim.settings import ShimSettings
from lachesis.shim.status import StatusRoutes
from lachesis.shim.trainers import HttpTrainers
from lachesis.shim.versions import Versions


def build_app(
    broker: Broker, settings: ShimSettings, *, draining: Callable[[], bool] = lambda: False, hold_s: float = HOLD_S
) -> Starlette:
    """The Trajectory API over `broker`. `draining` says whether the process is about to stop."""
    limit = settings.max_body_bytes
    versions = Versions(broker, settings.policy)
    trainers = HttpTrainers(broker, versions, settings.policy, settings.lease_s)
    groups = GroupsIn(broker, versions, lambda: Hold(broker, settings.queue_quota_bytes, draining, hold_s), limit)
    parties = PartyRoutes(broker, trainers, limit)

    def counts() -> dict[str, Any]:
        return {"groups": groups.counts, "lineage": {"joined": versions.joined, "unknown": versions.unknown}}

    status = StatusRoutes(broker, counts, limit)
    routes = [
        _get("/", root),
        _get("/info", parties.info),
        _get("/wandb_info", parties.wandb_info),
        _get("/status", status.status),
        _get("/status-env", status.status_env),
        _get("/batch", BatchEndpoint(broker, trainers)),
        _get("/latest_example", LatestExample(broker).latest),
        _get("/reset_data", parties.reset_data),
        _get("/healthz", status.healthz),
        Route("/register", parties.register, methods=["POST"]),
        Route("/register-env", parties.register_env, methods=["POST"]),
        Route("/disconnect-env", parties.disconnect_env, methods=["POST"]),
        Route("/scored_data", groups.scored_data, methods=["POST"]),
        Route("/scored_data_list", groups.scored_data_list, methods=["POST"]),
    ]
    middleware = [
        Middleware(GZipMiddleware, minimum_size=1000, compresslevel=1),
        Middleware(
            CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
        ),
    ]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS)


async def root(_: Request) -> Response:
    return JSONResponse({"message": "AtroposLib API"})


def _get(path: str, endpoint: Callable[..., Any]) -> Route:
    route = Route(path, endpoint, methods=["GET"])
    route.methods = {"GET"}  # Starlette adds HEAD; upstream does not, and HEAD /batch would take a batch to nobody
    return route

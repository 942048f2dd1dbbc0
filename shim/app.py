"""The ASGI application: its parts, made and joined here, under the table of routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount, Router
from starlette.routing import Route as HttpRoute
from starlette.types import Receive, Scope, Send

from lachesis.broker import Broker
from lachesis.service.http.access import Access, Seen
from lachesis.service.http.web_pages import guarded
from lachesis.shim.batch.endpoint import BatchEndpoint, LatestExample
from lachesis.shim.batch.http_trainers import HttpTrainers
from lachesis.shim.errors import HANDLERS, refuse
from lachesis.shim.http.access import Guard
from lachesis.shim.http.body import SMALL_BYTES
from lachesis.shim.http.run_router import Runs
from lachesis.shim.intake.backpressure import HOLD_S, Backpressure, Patient
from lachesis.shim.intake.decode import Bounds
from lachesis.shim.intake.intake import Intake
from lachesis.shim.intake.scored_data import ScoredDataRoutes
from lachesis.shim.intake.versions import Versions
from lachesis.shim.routes.openapi import openapi
from lachesis.shim.routes.registration import RegistrationRoutes
from lachesis.shim.routes.status import StatusRoutes
from lachesis.shim.routes.table import TABLE, Parts, Route
from lachesis.shim.settings import ShimSettings

CHANGING_GETS = tuple(route.path for route in TABLE if route.changing)


class _GZipOfGets(GZipMiddleware):
    """What a POST is answered is small."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def build_app(
    broker: Broker, settings: ShimSettings, *, draining: Callable[[], bool] = lambda: False, hold_s: float = HOLD_S
) -> Starlette:
    """The Trajectory API over `broker`'s Redis: its run under the bare paths, every run under `/runs/<run>`.

    `draining` says whether the process is about to stop.
    """

    seen: Seen = {}

    def serve(run: str) -> Router:
        own = run == broker.keys.run
        view = broker.for_run(run)
        access = Access(view, required=settings.require_tokens, seen=seen)
        return Router(_routes(view, settings, access, draining, hold_s, own=own))

    middleware = [
        *guarded(settings, refuse, changing=CHANGING_GETS),
        Middleware(_GZipOfGets, minimum_size=1000, compresslevel=1, exclude_content_types=()),  # a list costs each call
    ]
    runs = Mount("", Runs(serve, broker.keys.run))
    return Starlette(routes=[runs], middleware=middleware, exception_handlers=HANDLERS)


def _routes(
    broker: Broker, settings: ShimSettings, access: Access, draining: Callable[[], bool], hold_s: float, *, own: bool
) -> list[HttpRoute]:
    """One run's parts, made and joined, under its routes. `own`: the run of the bare paths, whose admins list all runs."""
    limit = settings.max_body_bytes
    versions = Versions(broker, settings.policy)
    trainers = HttpTrainers(broker, versions, settings)
    backpressure = Backpressure(broker, settings.limits, draining, hold_s)
    window_s = settings.duplicate_window_s
    bounds = Bounds(limit, settings.max_body_lists)
    intake = Intake(broker, versions, backpressure, bounds, window_s=window_s, refused_bytes=settings.refused_bytes)

    def counts() -> dict[str, Any]:
        return {"groups": intake.counts, "lineage": versions.counts}

    parts = Parts(
        groups=ScoredDataRoutes(broker, intake, backpressure, limit, window_s, settings.max_runs),
        registry=RegistrationRoutes(broker, trainers, min(limit, SMALL_BYTES), settings.max_runs),
        status=StatusRoutes(broker, access, counts, min(limit, SMALL_BYTES)),
        batch=BatchEndpoint(broker, trainers),
        example=LatestExample(broker),
        openapi=openapi,
    )

    def serve(route: Route) -> HttpRoute:
        before = [Middleware(Patient, draining, hold_s)] if route.patient else []
        before += [Middleware(Guard, access, route.roles)] if route.roles else []
        served = HttpRoute(route.path, route.endpoint(parts), methods=[route.method], middleware=before)
        # Starlette adds HEAD; upstream does not, and HEAD /batch would take a batch to nobody
        served.methods = {route.method}
        return served

    return [serve(route) for route in TABLE if own or not route.all_runs]

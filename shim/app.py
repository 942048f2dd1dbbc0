"""The ASGI application: its parts, made and joined here, and the table of routes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from lachesis.broker import Broker
from lachesis.broker.records.registrations import Role
from lachesis.service.http.access import ADMIN, ANY, ENVIRONMENT, OPEN, TRAINER, Access, Seen
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
from lachesis.shim.settings import ShimSettings

POSTS = ("/scored_data", "/scored_data_list")  # what an environment loses where they fail
CHANGING_GETS = ("/batch", "/reset_data")


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
        Middleware(GZipMiddleware, minimum_size=1000, compresslevel=1),
    ]
    runs = Mount("", Runs(serve, broker.keys.run))
    return Starlette(routes=[runs], middleware=middleware, exception_handlers=HANDLERS)


def _routes(
    broker: Broker, settings: ShimSettings, access: Access, draining: Callable[[], bool], hold_s: float, *, own: bool
) -> list[Route]:
    """One run's parts, made and joined, under its routes. `own`: the run of the bare paths, whose admins list all runs."""
    limit = settings.max_body_bytes
    versions = Versions(broker, settings.policy)
    trainers = HttpTrainers(broker, versions, settings)
    backpressure = Backpressure(broker, settings.limits, draining, hold_s)
    window_s = settings.duplicate_window_s
    bounds = Bounds(limit, settings.max_body_lists)
    intake = Intake(broker, versions, backpressure, bounds, window_s=window_s, refused_bytes=settings.refused_bytes)
    groups = ScoredDataRoutes(broker, intake, backpressure, limit, window_s, settings.max_runs)
    registry = RegistrationRoutes(broker, trainers, min(limit, SMALL_BYTES), settings.max_runs)

    def counts() -> dict[str, Any]:
        return {"groups": intake.counts, "lineage": versions.counts}

    status = StatusRoutes(broker, access, counts, min(limit, SMALL_BYTES))

    def route(method: str, path: str, endpoint: Callable[..., Any], roles: Collection[Role]) -> Route:
        before = [Middleware(Patient, draining, hold_s)] if path in POSTS else []
        before += [Middleware(Guard, access, roles)] if roles else []
        found = Route(path, endpoint, methods=[method], middleware=before)
        found.methods = {method}  # Starlette adds HEAD; upstream does not, and HEAD /batch would take a batch to nobody
        return found

    async def runs(_: Request) -> Response:
        return JSONResponse({"runs": [{"run": run, "since": since} for run, since in (await broker.runs()).items()]})

    return [  # they are tried in this order
        route("POST", "/scored_data", groups.scored_data, ENVIRONMENT),
        route("GET", "/status-env", status.status_env, ENVIRONMENT),
        route("GET", "/batch", BatchEndpoint(broker, trainers), TRAINER),
        route("GET", "/", root, ANY),
        route("GET", "/info", registry.info, ANY),
        route("GET", "/wandb_info", registry.wandb_info, ANY),
        route("GET", "/status", status.status, ANY),
        route("GET", "/latest_example", LatestExample(broker).latest, ANY),
        route("POST", "/register-env", registry.register_env, ENVIRONMENT),
        route("POST", "/disconnect-env", registry.disconnect_env, ENVIRONMENT),
        route("POST", "/scored_data_list", groups.scored_data_list, ENVIRONMENT),
        route("POST", "/register", registry.register, TRAINER),
        route("GET", "/reset_data", registry.reset_data, ADMIN),
        *([route("GET", "/runs", runs, ADMIN)] if own else []),
        route("GET", "/healthz", status.healthz, OPEN),
        route("GET", "/openapi.json", openapi, OPEN),
    ]


async def root(_: Request) -> Response:
    return JSONResponse({"message": "AtroposLib API"})

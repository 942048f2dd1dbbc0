"""The table of routes: what the app serves, and what `/openapi.json` says of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.registrations import EnvConfig, Role, TrainerConfig
from lachesis.service.http.access import ADMIN, ANY, ENVIRONMENT, OPEN, TRAINER
from lachesis.shim.batch.endpoint import BatchEndpoint, LatestExample
from lachesis.shim.http.answers import (
    Batch,
    Buffered,
    Disconnected,
    Duplicate,
    EnvRegistered,
    EnvStatus,
    EnvWaits,
    Greeting,
    Health,
    HTTPValidationError,
    Info,
    ListReceived,
    NoExample,
    NotDisconnected,
    NoTrainer,
    Received,
    Refusal,
    Registered,
    RunList,
    RunStatus,
    StoredGroup,
    WandbInfo,
)
from lachesis.shim.intake.scored_data import ScoredDataRoutes
from lachesis.shim.routes.registration import RegistrationRoutes
from lachesis.shim.routes.status import EnvIdentifier, StatusRoutes, greet

Answers = dict[int, tuple[Any, ...]]  # by status code, one or several shapes

PLAIN = str  # as an answer: text/plain
FULL: Answers = {429: (Refusal,)}
BAD_BODY: Answers = {400: (PLAIN,), 413: (Refusal,), 422: (HTTPValidationError,)}
TRAINER_ID, IDEMPOTENCY_KEY = "X-Trainer-Id", "Idempotency-Key"


@dataclass(frozen=True)
class Parts:
    """What serves one run."""

    groups: ScoredDataRoutes
    registry: RegistrationRoutes
    status: StatusRoutes
    batch: BatchEndpoint
    example: LatestExample
    openapi: Callable[..., Any]


class Route(NamedTuple):
    """One method of one path. Every route may also answer 403, 421 and 503, and one that has `roles` 401."""

    method: str
    path: str
    endpoint: Callable[[Parts], Callable[..., Any]]  # of the parts that serve a run, the one that serves this
    roles: Collection[Role]  # whose tokens may call it; empty: everyone may
    summary: str
    answers: Answers
    body: Any = None
    headers: tuple[str, ...] = ()
    patient: bool = (
        False  # what it asks of Redis waits as long as a post may: an environment loses what it fails to post
    )
    changing: bool = False  # though it is a GET
    all_runs: bool = False  # it tells of all of them, and is there for the shim's own run alone


TABLE = (  # they are tried in this order
    Route(
        "POST", "/scored_data", lambda run: run.groups.scored_data, ENVIRONMENT, "One group",
        {200: (Received, Duplicate, Buffered), **BAD_BODY, **FULL}, ScoredGroup, (IDEMPOTENCY_KEY,), patient=True,
    ),
    Route(
        "GET", "/status-env", lambda run: run.status.status_env, ENVIRONMENT, "The queue as one environment sees it",
        {200: (EnvStatus,), **BAD_BODY}, EnvIdentifier,
    ),
    Route(
        "GET", "/batch", lambda run: run.batch, TRAINER, "The next batch, leased",
        {200: (Batch, NoTrainer), 400: (Refusal,), **FULL}, None, (TRAINER_ID,), changing=True,
    ),
    Route("GET", "/", lambda _: greet, ANY, "Which API this is", {200: (Greeting,)}),
    Route("GET", "/info", lambda run: run.registry.info, ANY, "The trainer's sizes", {200: (Info,)}),
    Route("GET", "/wandb_info", lambda run: run.registry.wandb_info, ANY, "Where the trainer logs", {200: (WandbInfo,)}),
    Route("GET", "/status", lambda run: run.status.status, ANY, "Step and queue", {200: (RunStatus,)}),
    Route(
        "GET", "/latest_example", lambda run: run.example.latest, ANY, "The newest group still kept",
        {200: (StoredGroup, NoExample)},
    ),
    Route(
        "POST", "/register-env", lambda run: run.registry.register_env, ENVIRONMENT, "An environment's settings",
        {200: (EnvRegistered, EnvWaits), **BAD_BODY, **FULL}, EnvConfig,
    ),
    Route(
        "POST", "/disconnect-env", lambda run: run.registry.disconnect_env, ENVIRONMENT, "An environment ends",
        {200: (Disconnected, NotDisconnected), **BAD_BODY}, EnvIdentifier,
    ),
    Route(
        "POST", "/scored_data_list", lambda run: run.groups.scored_data_list, ENVIRONMENT, "A list of groups",
        {200: (ListReceived,), **BAD_BODY, **FULL}, list[ScoredGroup], (IDEMPOTENCY_KEY,), patient=True,
    ),
    Route(
        "POST", "/register", lambda run: run.registry.register, TRAINER, "A trainer's settings",
        {200: (Registered,), **BAD_BODY, **FULL, 400: (PLAIN, Refusal), 409: (Refusal,)}, TrainerConfig, (TRAINER_ID,),
    ),
    Route(
        "GET", "/reset_data", lambda run: run.registry.reset_data, ADMIN, "Forget queue, batches and registrations",
        {200: (PLAIN,)}, changing=True,
    ),
    Route(
        "GET", "/runs", lambda run: run.status.runs, ADMIN, "The runs that registered on this Redis", {200: (RunList,)},
        all_runs=True,
    ),
    Route(
        "GET", "/healthz", lambda run: run.status.healthz, OPEN, "200 while groups can be stored",
        {200: (Health,), 503: (Health,)},
    ),
    Route("GET", "/openapi.json", lambda run: run.openapi, OPEN, "This document", {200: (dict[str, Any],)}),
)  # fmt: skip

"""`/openapi.json`: every route, its body and its answers, generated from the records that the routes decode.

The Struct definitions below that no other module knows describe answers; tests hold each route's real answers to them.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from lachesis import __version__
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.packing import PACKED_TYPE
from lachesis.broker.records.registrations import EnvConfig, TrainerConfig
from lachesis.shim.batch.endpoint import KEYS, NO_EXAMPLE
from lachesis.shim.routes.status import EnvIdentifier

PLAIN = str  # as an answer: text/plain


class Greeting(Struct):
    message: str


class Registered(Struct):
    uuid: int  # of 128 bits: a client whose integers are floats can't keep it exactly


class EnvWaits(Struct):
    status: Literal["wait for trainer to start"]


class EnvRegistered(Struct):
    status: Literal["success"]
    env_id: int
    wandb_name: str
    checkpoint_dir: str
    starting_step: int
    checkpoint_interval: int
    num_steps: int


class Disconnected(Struct):
    status: Literal["success"]


class NotDisconnected(Struct):
    status: Literal["failure"]
    error: str


class WandbInfo(Struct):
    group: str | None
    project: str | None


class Info(Struct):
    batch_size: int  # sequences; -1 before a trainer has registered, as is max_token_len
    max_token_len: int


class RunStatus(Struct):
    current_step: int
    queue_size: int  # groups that no trainer has yet


class EnvStatus(Struct):
    current_step: int
    queue_size: int  # this and self_queue_size in groups of the asking environment's size
    unallocated_fraction: float
    self_queue_size: int
    max_group_size: int
    env_weight: float


class ValidationError(Struct):
    type: str
    loc: list[str | int]
    msg: str  # names field, value and rule
    input: Any
    ctx: dict[str, Any] | UnsetType = UNSET


class HTTPValidationError(Struct):
    detail: list[ValidationError]


class Refusal(Struct):
    detail: str


class Received(Struct):
    status: Literal["received"]


class Duplicate(Struct):
    status: Literal["duplicate"]
    detail: str  # by what it is known


class Buffered(Struct):
    status: Literal["buffered"]
    buffer_size: int  # sequences that wait with this group, whose size is not its environment's


class ListReceived(Struct):
    status: Literal["received", "duplicate"]  # duplicate: all of them
    groups_processed: int
    buffered: int | UnsetType = UNSET  # groups of other sizes than their environment's
    last_buffer_size: int | UnsetType = UNSET
    refused: int | UnsetType = UNSET  # well-formed groups that can't be trained, and why
    detail: list[ValidationError] | UnsetType = UNSET
    duplicates: int | UnsetType = UNSET  # repeated groups, which are not stored again


StoredGroup = msgspec.defstruct(
    "StoredGroup", [(field.name, field.type) for field in msgspec.structs.fields(ScoredGroup) if field.name in KEYS]
)  # a ScoredGroup on its way out: all keys are there
NoExample = msgspec.defstruct("NoExample", [(name, Annotated[list[Any], Meta(max_length=0)]) for name in NO_EXAMPLE])


class Batch(Struct):
    batch: list[StoredGroup] | None  # type: ignore[valid-type]


class NoTrainer(Struct):
    status: Literal["error"]
    message: str
    batch: Annotated[list[Any], Meta(max_length=0)]


class Run(Struct):
    run: str
    since: float  # seconds since the epoch


class RunList(Struct):
    runs: list[Run]


class Health(Struct):
    status: Literal["ok", "no redis", "redis demoted", "redis unready", "redis full", "redis forbids"]
    run: str | UnsetType = UNSET  # all the rest only for who may read the run
    groups: dict[str, int] | UnsetType = UNSET  # counts of this process, as are those of lineage
    lineage: dict[str, int] | UnsetType = UNSET
    dead: int | UnsetType = UNSET  # of the run, as is dropped: not known without Redis
    dropped: dict[str, int] | UnsetType = UNSET
    duplicates: dict[str, int] | UnsetType = UNSET  # likewise; posts dropped as repeats, by environment
    reason: str | UnsetType = UNSET  # why no group can be stored


class Route(NamedTuple):
    method: str
    path: str
    summary: str
    answers: dict[int, tuple[Any, ...]]  # by status code, one or several shapes
    body: Any = None
    headers: tuple[str, ...] = ()


OPEN = ("/healthz", "/openapi.json")  # the routes that ask nobody for a token
TOKENS = {
    "token": {"type": "http", "scheme": "bearer"},
    "token_in_url": {"type": "http", "scheme": "basic", "description": "any user; the token is the password"},
}
PACKED: dict[str, Any] = {"/scored_data": {PACKED_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
HEADERS: dict[str, dict[str, Any]] = {
    "X-Trainer-Id": {
        "description": "tells trainers that share an address apart; without it the address is the trainer's identity",
        "schema": {"type": "string", "pattern": NAME},
    },
    "Idempotency-Key": {
        "description": "posts with the same key are one post; without it, posts with the same decompressed body are",
        "schema": {"type": "string"},
    },
}
FULL: dict[int, tuple[Any, ...]] = {429: (Refusal,)}
BAD_BODY: dict[int, tuple[Any, ...]] = {400: (PLAIN,), 413: (Refusal,), 422: (HTTPValidationError,)}
DESCRIPTIONS = {
    200: "Answer",
    400: "A body that is not the gzip it says it is, or an impossible X-Trainer-Id",
    401: "The run has tokens, and this call has none of them",
    403: "The token is for another role, or another token's environment is named, or a web page calls",
    409: "A live trainer has registered other settings for this run",
    413: "A body of more than max_body_bytes after decompression, or with more in it than is read",
    421: "The header Host has a name that is not this server's",
    422: "A malformed body, or a group that can't be trained",
    429: "As many runs, environments or trainers as there may be",
    503: "Redis does not answer or refuses, or the queue stayed full for as long as a post may wait",
}

TABLE = (
    Route("GET", "/", "Which API this is", {200: (Greeting,)}),
    Route(
        "POST", "/register", "A trainer's settings", {200: (Registered,), **BAD_BODY, **FULL, 400: (PLAIN, Refusal), 409: (Refusal,)},
        TrainerConfig, ("X-Trainer-Id",),
    ),
    Route("POST", "/register-env", "An environment's settings", {200: (EnvRegistered, EnvWaits), **BAD_BODY, **FULL}, EnvConfig),
    Route(
        "POST", "/disconnect-env", "An environment ends", {200: (Disconnected, NotDisconnected), **BAD_BODY},
        EnvIdentifier,
    ),
    Route("GET", "/wandb_info", "Where the trainer logs", {200: (WandbInfo,)}),
    Route("GET", "/info", "The trainer's sizes", {200: (Info,)}),
    Route("GET", "/status", "Step and queue", {200: (RunStatus,)}),
    Route("GET", "/status-env", "The queue as one environment sees it", {200: (EnvStatus,), **BAD_BODY}, EnvIdentifier),
    Route(
        "POST", "/scored_data", "One group", {200: (Received, Duplicate, Buffered), **BAD_BODY, **FULL}, ScoredGroup, ("Idempotency-Key",),
    ),
    Route(
        "POST", "/scored_data_list", "A list of groups", {200: (ListReceived,), **BAD_BODY, **FULL}, list[ScoredGroup],
        ("Idempotency-Key",),
    ),
    Route(
        "GET", "/batch", "The next batch, leased", {200: (Batch, NoTrainer), 400: (Refusal,), **FULL}, None, ("X-Trainer-Id",)
    ),
    Route("GET", "/latest_example", "The newest group still kept", {200: (StoredGroup, NoExample)}),
    Route("GET", "/reset_data", "Forget queue, batches and registrations", {200: (PLAIN,)}),
    Route("GET", "/runs", "The runs that registered on this Redis", {200: (RunList,)}),
    Route("GET", "/healthz", "200 while groups can be stored", {200: (Health,), 503: (Health,)}),
    Route("GET", "/openapi.json", "This document", {200: (dict[str, Any],)}),
)  # fmt: skip


async def openapi(_: Request) -> Response:
    return Response(document(), media_type="application/json")


@cache
def document() -> bytes:
    """The OpenAPI 3.1 document, as JSON."""
    wanted = [kind for route in TABLE for kind in _kinds(route) if kind is not PLAIN]
    schemas, components = msgspec.json.schema_components(wanted, ref_template="#/components/schemas/{name}")
    schema_of = {repr(kind): schema for kind, schema in zip(wanted, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in TABLE:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    info = {"title": "Lachesis: Atropos's Trajectory API", "version": __version__, "description": ABOUT}
    parts = {"schemas": components, "securitySchemes": TOKENS}
    return msgspec.json.encode({"openapi": "3.1.0", "info": info, "paths": paths, "components": parts})


ABOUT = (
    'Bodies are JSON and may be gzip (`Content-Encoding: gzip`). Numbers are read laxly: `"8"`, `1.0` and `true` are '
    "integers. Unknown keys are ignored. Every route but `/runs` is also there under `/runs/<run>`, for that run, and "
    "under `/trainers/<name>`, which says who asks as X-Trainer-Id does."
)


def _kinds(route: Route) -> list[Any]:
    answers = [kind for kinds in route.answers.values() for kind in kinds]
    return [*answers, Refusal, *([route.body] if route.body else [])]


def _operation(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    guarded = {} if route.path in OPEN else {401: (Refusal,)}
    answers = {**guarded, 403: (Refusal,), 421: (Refusal,), 503: (Refusal,), **route.answers}
    name = route.path.strip("/").replace("-", "_").replace(".", "_") or "root"
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": name,
        "responses": {str(code): _answer(code, answers[code], schema_of) for code in sorted(answers)},
    }
    if route.body:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[repr(route.body)]}} | PACKED.get(route.path, {}),
        }
    if guarded:
        operation["security"] = [{}, {"token": []}, {"token_in_url": []}]
    if route.headers:
        operation["parameters"] = [
            {"name": header, "in": "header", "required": False, **HEADERS[header]} for header in route.headers
        ]
    return operation


def _answer(code: int, kinds: tuple[Any, ...], schema_of: dict[str, Any]) -> dict[str, Any]:
    shapes = [schema_of[repr(kind)] for kind in kinds if kind is not PLAIN]
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}} if PLAIN in kinds else {}
    if shapes:
        content["application/json"] = {"schema": shapes[0] if len(shapes) == 1 else {"anyOf": shapes}}
    return {"description": DESCRIPTIONS[code], "content": content}

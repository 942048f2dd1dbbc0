"""`/openapi.json`: every route of the table, its body and its answers, generated from their records."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lachesis import __version__
from lachesis.broker.records.packing import PACKED_TYPE
from lachesis.shim.http.answers import Refusal
from lachesis.shim.routes.table import IDEMPOTENCY_KEY, PLAIN, TABLE, TRAINER_ID, Route

TOKENS = {
    "token": {"type": "http", "scheme": "bearer"},
    "token_in_url": {"type": "http", "scheme": "basic", "description": "any user; the token is the password"},
}
PACKED: dict[str, Any] = {"/scored_data": {PACKED_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
HEADERS: dict[str, dict[str, Any]] = {
    TRAINER_ID: {
        "description": "tells trainers that share an address apart; without it the address is the trainer's identity",
        "schema": {"type": "string", "pattern": NAME},
    },
    IDEMPOTENCY_KEY: {
        "description": "posts with the same key are one post; without it, posts with the same decompressed body are",
        "schema": {"type": "string"},
    },
}
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
    guarded = {401: (Refusal,)} if route.roles else {}
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

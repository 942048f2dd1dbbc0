"""What a client reads when something is wrong: always JSON with the one key `detail`, as FastAPI answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lachesis.broker.errors import ConfigurationError, Conflict, InvalidGroup, LimitReached
from lachesis.broker.queue.admission import path
from lachesis.broker.store.redis_errors import Trouble, describe, trouble
from lachesis.service.http.access import Denied

SHOWN = 1000  # characters of a wrong value that are repeated to its sender
SHOWN_IN_TEXT = 100
SHOWN_DEPTH = 100
SHOWN_ERRORS = 20

Location = Sequence[str | int]


class Malformed(Exception):
    """A body that does not have the shape its route asks for; `details` as in FastAPI's answer."""

    def __init__(self, details: list[dict[str, Any]]) -> None:
        self.details = details
        super().__init__("; ".join(detail["msg"] for detail in details))


class InvalidGzip(Exception):
    """A body that says it is gzip, and is not or is cut short."""


def detail(kind: str, location: Location, value: object, rule: str, *, of: str = "body", **more: Any) -> dict[str, Any]:
    """One entry of a 422 answer; its `msg` names field, value and rule. `location` is relative to the body, or to `of`."""
    text = repr(_beginning(value, SHOWN_IN_TEXT))
    text = text if len(text) <= SHOWN_IN_TEXT else f"{text[:SHOWN_IN_TEXT]}…"
    found = "" if kind == "missing" else f" = {text}"
    return {
        "type": kind,
        "loc": [of, *location],
        "msg": f"{path(location)}{found}: {rule}",
        "input": shown(value),
        **more,
    }


def refusal(error: InvalidGroup, prefix: Location = ()) -> dict[str, Any]:
    """The entry for a group that can't be trained; `prefix` is its place in a list of groups."""
    words: list[str | int] = [int(word) if word.isdigit() else word for word in re.findall(r"\w+", error.field)]
    return detail("value_error", [*prefix, *words], error.value, error.rule)


def shown(value: object) -> Any:
    """The value if it can stand in an answer, else its beginning as text."""
    value = _beginning(value, SHOWN)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, TypeError, RecursionError):
        text = repr(value)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return value if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _beginning(value: Any, characters: int) -> Any:
    """The value, or so much of it that its text begins with the same characters: not to write megabytes, to cut them."""
    left = characters + 1  # of each value's text at least one

    def cut(value: Any, depth: int) -> Any:
        nonlocal left
        if isinstance(value, str | bytes):
            left -= 2 + len(value)
            return value[: characters + 1]
        left -= 1
        if depth > SHOWN_DEPTH:
            return "…"
        if isinstance(value, list | tuple):
            return [cut(item, depth + 1) for item in takewhile(lambda _: left > 0, value)]
        if isinstance(value, dict):
            return {cut(key, depth): cut(item, depth + 1) for key, item in takewhile(lambda _: left > 0, value.items())}
        return value

    return cut(value, 0)


async def http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)


async def malformed(_: Request, error: Exception) -> Response:
    assert isinstance(error, Malformed)
    return JSONResponse({"detail": error.details}, 422)


async def invalid_group(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidGroup)
    return JSONResponse({"detail": [refusal(error)]}, 422)


async def invalid_gzip(_: Request, __: Exception) -> Response:
    return PlainTextResponse("Invalid gzip payload", 400)


async def conflict(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 409)


async def limit_reached(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 429, headers={"Retry-After": "60"})


async def denied(_: Request, error: Exception) -> Response:
    assert isinstance(error, Denied)
    return JSONResponse({"detail": str(error)}, error.status, headers=error.headers)


def refuse(status: int, message: str) -> Response:
    return JSONResponse({"detail": message}, status)


async def bad_request(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 400)


async def redis_trouble(_: Request, error: Exception) -> Response:
    """What Redis refuses, or has no answer to, may be asked again; a mistake of ours is none of the client's business."""
    if (kind := trouble(error)) is None:
        raise error
    return JSONResponse({"detail": describe(error)}, 503, headers={"Retry-After": retry_after(kind)})


def retry_after(kind: Trouble) -> str:
    """Seconds for the header Retry-After."""
    return "10" if kind in (Trouble.FULL, Trouble.FORBIDDEN) else "1"


async def client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # for the log of a proxy: nobody else reads it


HANDLERS: dict[Any, Any] = {
    HTTPException: http_error,
    Malformed: malformed,
    InvalidGzip: invalid_gzip,
    InvalidGroup: invalid_group,
    Conflict: conflict,
    LimitReached: limit_reached,
    Denied: denied,
    ConfigurationError: bad_request,
    RedisError: redis_trouble,
    ClientDisconnect: client_gone,
}

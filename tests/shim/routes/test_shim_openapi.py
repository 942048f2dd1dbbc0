"""`/openapi.json` beside upstream's generated document, and beside what the shim really answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from side_by_side import side_by_side
from trajectories import ENV, TRAINER, group

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.packing import PACKED_TYPE
from lachesis.shim.app import build_app
from lachesis.shim.routes.openapi import document
from lachesis.shim.settings import ShimSettings

MORE_ROUTES = {
    ("get", "/healthz"): "for supervisors and load balancers: upstream has none",
    ("get", "/runs"): "one Redis serves many runs",
    ("get", "/openapi.json"): "upstream serves it too; FastAPI does not list it",
}
MORE_ANSWERS = {
    "400": "upstream answers it to broken gzip; FastAPI does not know. An impossible X-Trainer-Id gets it, too",
    "401": "runs may have tokens",
    "403": "runs may have tokens, and web pages may not call",
    "409": "another trainer's settings: upstream ignores the second registration",
    "413": "bodies are bounded",
    "421": "a web page can give its own name to any address",
    "429": "environments, trainers and runs are bounded",
    "503": "Redis does not answer, refuses, or is full; upstream keeps everything in its own memory",
}
MORE_KEYS = {"weight_versions": "an environment that knows its weight versions may say so; upstream ignores the key"}
MORE_BODIES = {PACKED_TYPE: "what our own clients post, instead of JSON"}
MORE_PARAMETERS = {
    "X-Trainer-Id": "tells HTTP trainers apart",
    "Idempotency-Key": "names a post that may be sent again",
}
MORE_REQUIRED = {"input": "each entry of a 422 shows the wrong value; upstream's does so without promising it"}
WEAKER_UPSTREAM = "the answer of a route is `{}`, anything, in upstream's document"


def plain(schema: Any, components: dict[str, Any]) -> Any:
    """A schema without what says nothing of types: references, titles, descriptions, defaults, open objects."""
    if isinstance(schema, list):
        return sorted((plain(item, components) for item in schema), key=repr)
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return plain(components[schema["$ref"].rpartition("/")[2]], components)
    if {} in schema.get("anyOf", ()):  # anything, or null: anything
        return {}
    kept = {name: value for name, value in schema.items() if name not in ("title", "description", "default")}
    if kept.get("additionalProperties") is True:
        del kept["additionalProperties"]
    if "properties" in kept:
        fields = {
            name: plain(value, components) for name, value in kept.pop("properties").items() if name not in MORE_KEYS
        }
        return {**{name: plain(value, components) for name, value in kept.items()}, "properties": fields}
    return {name: plain(value, components) for name, value in kept.items()}


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method, path): found for path, item in document["paths"].items() for method, found in item.items()}


def body(operation: dict[str, Any], document: dict[str, Any]) -> Any:
    if "requestBody" not in operation:
        return None
    wanted = operation["requestBody"]
    return wanted["required"], {
        kind: plain(content["schema"], document["components"]["schemas"])
        for kind, content in wanted["content"].items()
        if kind not in MORE_BODIES
    }


def test_the_document_says_what_upstreams_says(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path) -> None:
    with side_by_side(shared_redis.url, run_name, tmp_path / "log") as both:
        theirs, ours = (answer.json() for answer in both.each("GET", "/openapi.json"))
        for missing in ("/docs", "/redoc"):  # pages that load their scripts from elsewhere
            assert [answer.status_code for answer in both.each("GET", missing)] == [200, 404]
    assert ours["openapi"] == theirs["openapi"]
    upstream, shim = operations(theirs), operations(ours)
    assert set(shim) - set(upstream) == set(MORE_ROUTES)
    assert set(upstream) <= set(shim)
    for name, operation in upstream.items():
        mine = shim[name]
        assert body(mine, ours) == body(operation, theirs), name
        assert set(operation["responses"]) <= set(mine["responses"]), name
        assert set(mine["responses"]) - set(operation["responses"]) <= set(MORE_ANSWERS), name
        assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {}, WEAKER_UPSTREAM
        assert "parameters" not in operation, name
        assert {given["name"] for given in mine.get("parameters", [])} <= set(MORE_PARAMETERS), name
    errors = [
        plain(found["components"]["schemas"]["HTTPValidationError"], found["components"]["schemas"])
        for found in (theirs, ours)
    ]
    entries = [error["properties"]["detail"]["items"] for error in errors]
    assert entries[0]["properties"] == entries[1]["properties"]
    assert set(entries[1]["required"]) - set(entries[0]["required"]) == set(MORE_REQUIRED)
    assert set(entries[0]["required"]) <= set(entries[1]["required"])


@pytest.mark.anyio
async def test_every_route_is_in_the_document(broker: Broker) -> None:
    (mount,) = build_app(broker, ShimSettings()).routes
    routes = mount.app._served[broker.keys.run].app.routes  # type: ignore[attr-defined]
    served = {(method.lower(), route.path) for route in routes for method in route.methods}
    assert served == set(operations(json.loads(document())))


def check(answer: httpx.Response) -> None:
    """Raise unless the document promises this answer, each of its keys included."""
    told = json.loads(document())
    operation = told["paths"][answer.request.url.path][answer.request.method.lower()]
    content = operation["responses"][str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        closed = {
            name: {**schema, "additionalProperties": False} for name, schema in told["components"]["schemas"].items()
        }
        schema = {**content[kind]["schema"], "components": {"schemas": closed}}
        jsonschema.Draft202012Validator(schema).validate(answer.json())
    else:
        assert content[kind] == {"schema": {"type": "string"}}


@pytest.mark.anyio
async def test_every_kind_of_answer_is_as_the_document_says(client: httpx.AsyncClient, broker: Broker) -> None:
    broken, spoilt = {"Content-Encoding": "gzip"}, {**group(1), "scores": [0.0]}
    names = {"X-Trainer-Id": "?"}
    calls: list[tuple[str, str, dict[str, Any], int]] = [
        *(("GET", path, {}, 200) for path in ("/", "/info", "/wandb_info", "/status", "/batch", "/latest_example")),
        ("POST", "/register-env", {"json": ENV}, 200),
        ("POST", "/register", {"json": TRAINER, "headers": names}, 400),
        ("POST", "/register", {"json": TRAINER}, 200),
        ("GET", "/batch", {}, 200),
        ("GET", "/batch", {"headers": names}, 400),
        ("POST", "/register", {"json": {**TRAINER, "batch_size": 8}}, 409),
        *(("GET", path, {}, 200) for path in ("/info", "/wandb_info", "/healthz", "/openapi.json", "/runs")),
        ("POST", "/register-env", {"json": ENV}, 200),
        ("GET", "/status-env", {"json": {"env_id": 0}}, 200),
        ("POST", "/scored_data", {"json": group(8, 1, env_id=0)}, 200),
        ("POST", "/scored_data_list", {"json": [group(9, 1, env_id=0)]}, 200),
        ("POST", "/disconnect-env", {"json": {"env_id": 0}}, 200),
        ("POST", "/disconnect-env", {"json": {"env_id": 7}}, 200),
        ("POST", "/scored_data", {"json": group(1)}, 200),
        ("POST", "/scored_data", {"json": spoilt}, 422),
        ("POST", "/scored_data", {"content": b"{"}, 422),
        ("POST", "/scored_data", {"content": b"{", "headers": broken}, 400),
        ("POST", "/scored_data", {"content": gzip.compress(bytes(257 << 20), 1), "headers": broken}, 413),
        ("POST", "/scored_data_list", {"json": [group(2)]}, 200),
        ("POST", "/scored_data_list", {"json": [group(3), spoilt]}, 200),
        ("POST", "/scored_data_list", {"json": [spoilt]}, 422),
        *(("GET", path, {}, 200) for path in ("/latest_example", "/batch", "/reset_data")),
    ]  # fmt: skip
    for method, path, how, code in calls:
        answer = await client.request(method, path, **how)
        assert answer.status_code == code, (method, path, answer.text)
        check(answer)

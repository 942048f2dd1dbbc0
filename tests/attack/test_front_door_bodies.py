"""Requests to the front door that are larger inside than they look, or deeper."""

from __future__ import annotations

import json

import pytest
from doors import REQUEST, Upstream, answers, door

from lachesis.broker import Broker

pytestmark = pytest.mark.anyio

REFUSED = {
    "brackets": (b"[" * (1 << 20), 413, "lists and objects: must hold at most 100000"),
    "lists": (b'{"input_ids":[1],"x":[' + b"[]," * (5 << 20) + b"[]]}", 413, "lists and objects"),
    "objects": (b'{"input_ids":[1],"x":[' + b"{}," * 100_000 + b"{}]}", 413, "lists and objects"),
    "values": (b'{"input_ids":[' + b"1," * 1_300_000 + b"1]}", 413, "values: must hold at most 1200000"),
    "bytes": (b'{"text":"' + b"x" * 1_000_000 + b'"}', 413, "must not be larger than max_body_bytes"),
    "deep": (b'{"x":' + b"[" * 90_000 + b"]" * 90_000 + b"}", 400, "must be a JSON object"),
    "deep and open": (b'{"x":' + b"[" * 90_000, 400, "must be a JSON object"),
}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_what_is_refused(broker: Broker, path: str) -> None:
    async with Upstream(broker, "s", answers).running() as server, door(broker, max_body_bytes=16 << 20) as client:
        for name, (body, status, words) in REFUSED.items():
            async with client.post(path, data=body * (17 if name == "bytes" else 1)) as response:
                told = await response.json()
                assert (response.status, told["error"]["code"]) == (status, status), name
                assert words in told["error"]["message"], name
                assert told["error"]["field"] == "body"
                assert len(json.dumps(told)) < 2000
        assert server.bodies == []


async def test_text_and_long_prompts_pass(broker: Broker) -> None:
    async with Upstream(broker, "s", answers).running() as server, door(broker) as client:
        for change in ({"text": "[{," * 100_000, "input_ids": None}, {"input_ids": [5] * 50_000}):
            body = {name: value for name, value in (REQUEST | change).items() if value is not None}
            async with client.post("/generate", json=body) as response:
                assert response.status == 200
            sent = server.bodies[-1]
            assert sent.get("text") == body.get("text")
            assert sent.get("input_ids") == body.get("input_ids")

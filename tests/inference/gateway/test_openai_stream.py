"""Streams of the OpenAI routes: what is read of them, what the client sees, and when their versions are known."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest
from aiohttp import web
from doors import Upstream, door
from hypothesis import given
from hypothesis import strategies as st

from lachesis.broker import Broker
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Lineage
from lachesis.inference.gateway.protocols.openai_stream import OpenAIStream

ROUTES = ("/v1/completions", "/v1/chat/completions")
PROMPTS: dict[str, dict[str, Any]] = {ROUTES[0]: {"prompt": [1]}, ROUTES[1]: {"messages": [{"role": "user"}]}}


def events(*chunks: Any) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def chunk(index: int, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": "a", "finish_reason": finish, **more}]}


def told(path: str, finish: str = "stop") -> tuple[bytes, bytes]:
    """(what SGLang sends, what is left of it for a client who asked for no ids): outputs 7 8 and 9 to prompt 1."""
    plain = [chunk(0), chunk(1, finish), chunk(0, finish), {"choices": [], "usage": {"total_tokens": 4}}]
    if path == ROUTES[0]:
        ids = [
            {"token_ids": [7], "prompt_token_ids": [1]},
            {"token_ids": [9], "prompt_token_ids": [1]},
            {"token_ids": [8]},
        ]
        full = [{"choices": [each["choices"][0] | more]} for each, more in zip(plain, ids, strict=False)] + plain[3:]
    else:
        full = [*plain[:3], {"choices": [], "sglext": {"input_ids": [1], "output_ids": [[7, 8], [9]]}}, *plain[3:]]
    return events(*full), events(*plain)


def read(stream: OpenAIStream, raw: bytes, cuts: list[int]) -> tuple[bytes, set[tuple[int, ...]]]:
    edges = sorted({0, *(min(cut, len(raw)) for cut in cuts), len(raw)})
    sent, found = b"", set()
    for start, end in pairwise(edges):
        piece, complete = stream.pass_on(raw[start:end])
        sent += piece
        found |= {(*(each.prompt_token_ids or ()), *(each.output_ids or ())) for each in complete}
    return sent, found


@pytest.mark.parametrize("path", ROUTES)
@given(cuts=st.lists(st.integers(0, 900), max_size=5))
def test_however_it_is_cut_its_ids_are_read_and_kept_back(path: str, cuts: list[int]) -> None:
    full, plain = told(path)
    assert read(OpenAIStream(path, {}), full, cuts) == (plain, {(1, 7, 8), (1, 9)})
    asking = OpenAIStream(path, dict.fromkeys(OpenAIStream(path, {}).asked, True))
    assert asking.asked == {}
    assert read(asking, full, cuts) == (full, {(1, 7, 8), (1, 9)})


@pytest.mark.parametrize("path", ROUTES)
def test_what_was_aborted_or_is_no_chunk_tells_nothing(path: str) -> None:
    full, plain = told(path, "abort")
    assert read(OpenAIStream(path, {}), full, []) == (plain, set())
    odd = b'data: {"error": {"message": "no"}}\n\ndata: {broken\n\n: comment\n\n'
    assert read(OpenAIStream(path, {}), odd, []) == (odd, set())


# -- through a front door -----------------------------------------------------------------------------------------


class Streams:
    """Serves `version`; a stream's last half waits for `go_on`."""

    def __init__(self, path: str) -> None:
        self.version, self.path = "4", path
        self.go_on, self.half = anyio.Event(), anyio.Event()

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def __call__(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        full, _ = told(self.path)
        cut = full.index(b"\n\n") + 2
        await response.write(full[:cut])
        self.half.set()
        await self.go_on.wait()
        await response.write(full[cut:])
        return response


async def streamed(broker: Broker, path: str, *, becomes: str = "4", rule: str = "newest", **settings: Any) -> tuple[bytes, list[Lineage | None], dict[str, Any]]:  # fmt: skip
    """(what the client got, the lineage of both outputs, what the server was asked)."""
    streams = Streams(path)
    server = Upstream(broker, "s", streams)
    server.rule, server.on_get = rule, streams.info
    async with server.running():
        if settings.pop("router", False):
            settings["upstream"] = server.url
        async with door(broker, **settings) as client:
            call = asyncio.create_task(_read(client, path))
            await streams.half.wait()
            streams.version = becomes
            streams.go_on.set()
            raw = await call
    return raw, await broker.lineage.look_up([tokens_digest([1, 7, 8]), tokens_digest([1, 9])]), server.bodies[0]


async def _read(client: aiohttp.ClientSession, path: str) -> bytes:
    async with client.post(path, json={"stream": True, "n": 2, **PROMPTS[path]}) as response:
        assert response.status == 200
        return await response.read()


@pytest.mark.anyio
@pytest.mark.parametrize("path", ROUTES)
async def test_one_version_is_recorded(broker: Broker, path: str) -> None:
    raw, found, _ = await streamed(broker, path)
    assert raw == told(path)[1]
    assert found == [Lineage(4, 4, ((4, 0, 2),)), Lineage(4, 4, ((4, 0, 1),))]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("how", [{"becomes": "5"}, {"becomes": "default"}, {"rule": "pin"}], ids=str)
async def test_what_an_update_may_have_come_upon_is_not(broker: Broker, path: str, how: dict[str, str]) -> None:
    raw, found, _ = await streamed(broker, path, **how)
    assert raw == told(path)[1]
    assert found == [None, None]


@pytest.mark.anyio
@pytest.mark.parametrize("how", [{"router": True}, {"lineage_bytes": 0}], ids=str)
async def test_where_nothing_can_or_shall_be_recorded_nothing_is_asked(broker: Broker, how: dict[str, Any]) -> None:
    raw, found, asked = await streamed(broker, ROUTES[0], **how)
    assert raw == told(ROUTES[0])[0]
    assert found == [None, None]
    assert {name for name in asked if name not in ("rid", "extra_key")} == {"stream", "n", "prompt"}

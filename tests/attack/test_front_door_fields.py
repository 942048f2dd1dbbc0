"""Each field that may pass the front door, at its edges, against a real SGLang: none of it may cost a server.

The edges come from the tables in inference/gateway/request_fields.py, so a field that is added there is tried here. What the front door
refuses is not sent; that it is refused is shown in tests/inference/gateway/test_request_check.py.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest
import roles
from msgspec import inspect
from published import CONTEXT, VOCAB, make_model

from lachesis.broker import EmbeddedRedis
from lachesis.inference.gateway import request_fields
from lachesis.inference.gateway.protocols.sglang import BadRequest
from lachesis.inference.gateway.request_check import RequestCheck, check_vocabulary

pytestmark = [pytest.mark.anyio, pytest.mark.sglang, pytest.mark.timeout(600)]

RUN = "fields"
AT_ONCE = 16  # requests; in the long form they come one by one, so that a death has one cause
ANSWER_S = 240.0  # far more than any of them takes on a busy machine
HEALTHY = {"input_ids": [9, 10, 11], "sampling_params": {"max_new_tokens": 2}}
MESSAGES = [{"role": "user", "content": "hi"}]
PROMPT = [5, 6, 7, 8]
ROUTES: dict[str, tuple[str, type[msgspec.Struct], dict[str, Any]]] = {
    "generate": ("/generate", request_fields.Generate, {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}}),
    "sampling": ("/generate", request_fields.Native, {"max_new_tokens": 2}),
    "vllm": ("/generate", request_fields.VLLM, {"prompt": PROMPT, "max_tokens": 2}),
    "completions": ("/v1/completions", request_fields.Completion, {"prompt": PROMPT, "max_tokens": 2}),
    "chat": ("/v1/chat/completions", request_fields.Chat, {"messages": MESSAGES, "max_tokens": 2}),
}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, VOCAB - 1, VOCAB, CONTEXT, CONTEXT - 1, CONTEXT - len(PROMPT), 2**31 - 1, 2**31, 2**32,
    2**63 - 1, -(2**63), 2**63, 10**30, 1.5, 1e-300, 5e-324, 1e308, -1e308, 1e-6, 1e-7, "", " ", "x", "1", "\0", "\u2028é💥", "a" * 600,
    "(a+)+$" * 9, "((((" * 9, '{"type":"object"}', "{{{", "root ::= root", [], [[]], [None], [0], [1, 2], [-1], [VOCAB - 1],
    [VOCAB], [True], ["x"], ["", "a"], ["x"] * 32, [[1], [2, 3]], [[1], []], [[[1]]], [{}], {}, {"type": "json_object"},
    {"a": {"b": [1] * 9}}, {"0": 1}, {"319": 100, "0": -100}, {"type": "function", "function": {"name": "f"}},
    {"enable_thinking": True, "tools": 5, "tokenize": True, "messages": [], "chat_template": "{{ 1/0 }}"},
]  # fmt: skip


def given_bounds(*bounds: Any) -> set[Any]:
    """Those that there are."""
    return {bound for bound in bounds if bound is not None}


def edges(kind: inspect.Type) -> Iterator[Any]:
    """What lies at the edges of a type's range, and just beyond them."""
    if isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from edges(each)
    elif isinstance(kind, inspect.IntType):
        for edge in given_bounds(kind.ge, kind.le):
            yield from (edge, edge - 1, edge + 1)
    elif isinstance(kind, inspect.FloatType):
        for bound in given_bounds(kind.gt, kind.ge, kind.le):
            yield from (bound, bound - 1e-9, bound + 1e-9, bound * (1 - 1e-12))
    elif isinstance(kind, inspect.StrType):
        yield from ("x" * length for length in (kind.max_length or 3000, (kind.max_length or 3000) + 1))
    elif isinstance(kind, inspect.ListType):
        inside = next((each for each in ODD if accepts(kind, [each])), None)
        yield from ([inside] * length for length in (kind.max_length or 600, (kind.max_length or 600) + 1))
        yield from ([each] for each in edges(kind.item_type))
    elif isinstance(kind, inspect.DictType):
        yield {str(token): token % 200 - 100 for token in range(VOCAB)}


def accepts(kind: inspect.Type, value: Any) -> bool:
    with suppress(msgspec.ValidationError):
        msgspec.convert(value, list[int] if isinstance(getattr(kind, "item_type", None), inspect.IntType) else Any)
        return True
    return False


def single_edges(*, all_odd: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, request), each with one field at an edge; fields of a few types are tried with every odd value anyway."""
    for route, (path, kind, least) in ROUTES.items():
        for field in inspect.type_info(kind).fields:  # type: ignore[attr-defined]
            if field.name in ("rid", "request_id") and not all_odd:
                continue  # it never reaches SGLang
            ranged = not isinstance(field.type, inspect.AnyType) and "dict" not in str(field.type).lower()
            for value in edges(field.type) if ranged and not all_odd else (*ODD, *edges(field.type)):
                request = least | {field.name: value}
                if field.name in ("text", "input_ids"):
                    request = {"sampling_params": {"max_new_tokens": 2}, field.name: value}
                yield path, {"input_ids": PROMPT, "sampling_params": request} if route == "sampling" else request


def together() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is dangerous in company."""
    for start, top, ids, logprob, prompt in itertools.product(
        (-1, 0, 1, len(PROMPT) - 1, len(PROMPT)), (0, 1, 128), (None, [], [0], [VOCAB - 1] * 1024), (True, False, None),
        (PROMPT, [300, 301, 302, 303], [PROMPT, PROMPT]),
    ):  # fmt: skip
        yield "/generate", {
            "input_ids": prompt, "return_logprob": logprob, "logprob_start_len": start, "top_logprobs_num": top,
            "token_ids_logprob": ids, "sampling_params": {"max_new_tokens": 1},
        }  # fmt: skip
    sampling: dict[str, tuple[Any, ...]] = {
        "n": (1, 2, 64),
        "max_new_tokens": (0, 1, CONTEXT, 2**31 - 1),
        "min_new_tokens": (0, 1, CONTEXT),
        "stop": (None, "", ["a"] * 32),
        "stop_token_ids": (None, [0, 1, VOCAB - 1], list(range(VOCAB))),
        "logit_bias": (None, {"7": 100}, {str(token): -100 for token in range(VOCAB)}),
        "ignore_eos": (True, False),
        "temperature": (0, 1e-7, 1, 1e6),
        "top_k": (-1, 1, 1 << 30),
        "top_p": (5e-324, 1),
        "min_p": (0, 1),
        "repetition_penalty": (0.01, 2),
        "frequency_penalty": (-2, 2),
        "sampling_seed": (None, 0, 2**63 - 1),
        "json_schema": (None, '{"type":"object"}'),
        "regex": (None, "(a|b){9}"),
    }
    for one, other in itertools.combinations(sampling, 2):
        for value, another in itertools.product(sampling[one], sampling[other]):
            request = {"max_new_tokens": 2, one: value, other: another}
            yield "/generate", {"input_ids": PROMPT, "sampling_params": request, "stream": len(one) % 2 == 0}


def passing(cases: Iterator[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Those that the front door lets through, each once."""
    found: dict[bytes, tuple[str, dict[str, Any]]] = {}
    for path, request in cases:
        with suppress(BadRequest):
            check_vocabulary(RequestCheck()(path, request), VOCAB)
            found[msgspec.json.encode((path, request))] = (path, request)
    return list(found.values())


class Bench:
    """A front door and a real server."""

    def __init__(self, client: aiohttp.ClientSession, agent: roles.Role) -> None:
        self._client, self._agent = client, agent
        self.pid = roles.below(agent.process.pid)[0]

    async def send(self, path: str, body: dict[str, Any]) -> int:
        async with self._client.post(path, json=body, timeout=aiohttp.ClientTimeout(ANSWER_S)) as response:
            await response.read()
            return response.status

    async def all(self, cases: list[tuple[str, dict[str, Any]]], at_once: int) -> None:
        for start in range(0, len(cases), at_once):
            batch = cases[start : start + at_once]
            statuses = await asyncio.gather(*(self.send(*case) for case in batch), return_exceptions=True)
            bad = [(case, status) for case, status in zip(batch, statuses, strict=True) if status not in (200, 400)]
            assert not bad, str(bad)[:2000]
            assert await self.send("/generate", HEALTHY) == 200, str(batch)[:2000]
            assert roles.alive(self.pid), f"the server died of one of {str(batch)[:5000]}"
            assert roles.below(self._agent.process.pid)[0] == self.pid


@pytest.fixture(scope="module")
async def bench(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    folder = tmp_path_factory.mktemp("fields")
    common = ("--redis-url", shared_redis.url, "--run", RUN, "--state-dir", str(folder))
    listener = roles.listener()
    door = roles.front_door(folder / "door.log", *common, "--fd", str(listener.fileno()), inherit=listener)
    agent = roles.agent(folder / "agent.log", *common, "--model", str(make_model(folder / "base")))
    try:
        connector = aiohttp.TCPConnector(force_close=True)  # else one may be reused just when the door closes it
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{listener.getsockname()[1]}", connector=connector
        ) as client:
            with anyio.fail_after(290):
                async with client.post("/generate", json=HEALTHY) as response:
                    assert response.status == 200
            yield Bench(client, agent)
    finally:
        door.kill()
        agent.kill()
        listener.close()


async def test_no_field_at_its_edges_costs_a_server(bench: Bench, long_form: bool) -> None:
    await bench.all(passing(single_edges(all_odd=long_form)), 1 if long_form else AT_ONCE)


async def test_nor_do_fields_together(bench: Bench, long_form: bool) -> None:
    cases = passing(together())
    if not long_form:
        cases = random.Random(0).sample(cases, 300)
    await bench.all(cases, 1 if long_form else AT_ONCE)

"""Completions of several prompts or outputs are asked for one by one and answered as one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from aiohttp import web
from doors import Upstream, door

from lachesis.broker import Broker
from lachesis.broker.records.entries import tokens_digest
from lachesis.inference.gateway.protocols.fan_out import MOST_OUTPUTS, merge, singles

PATH = "/v1/completions"


class Completes:
    """Completes each prompt by its own number: of the version, of the output, and of the log-prob's tenths."""

    def __init__(self) -> None:
        self.made = 0

    async def __call__(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["prompt"] == [66]:
            return web.json_response({"message": "no 66"}, status=400)
        if not isinstance(body["prompt"][0], int) or body.get("n", 1) != 1:
            return web.json_response({"choices": [], "metadata": None})
        self.made += 1
        choice: dict[str, Any] = {"index": 0, "text": str(self.made), "finish_reason": "length", "logprobs": None}
        if body.get("return_token_ids"):
            choice |= {"token_ids": [self.made], "prompt_token_ids": body["prompt"]}
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": [-self.made / 10]}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1, "total_tokens": len(body["prompt"]) + 1}
        metadata = {"weight_version": str(self.made), "weight_versions": None}
        return web.json_response({"id": "c", "choices": [choice], "usage": usage, "metadata": metadata})


@pytest.mark.anyio
async def test_every_output_is_recorded_and_the_answer_is_whole(broker: Broker) -> None:
    body = {"prompt": [[1, 2], [3]], "n": 2, "max_tokens": 1}
    async with Upstream(broker, "s", Completes()).running() as server, door(broker) as client:
        async with client.post(PATH, json=body) as response:
            told = await response.json()
        texts = [choice["text"] for choice in told["choices"]]
        digests = [
            tokens_digest([*prompt, int(text)]) for prompt, text in zip([[1, 2], [1, 2], [3], [3]], texts, strict=True)
        ]
        found = await broker.lineage.look_up(digests)
    assert sorted(texts) == ["1", "2", "3", "4"]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert [set(choice) for choice in told["choices"]] == [{"index", "text", "finish_reason", "logprobs"}] * 4
    assert told["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": None
    }  # fmt: skip
    assert [lineage and lineage.v_min for lineage in found] == [int(text) for text in texts]
    assert len({sent["rid"] for sent in server.bodies}) == 4


@pytest.mark.anyio
async def test_one_that_is_refused_refuses_all(broker: Broker) -> None:
    async with (
        Upstream(broker, "s", Completes()).running(),
        door(broker) as client,
        client.post(PATH, json={"prompt": [[1], [66]]}) as response,
    ):
        assert (response.status, await response.json()) == (400, {"message": "no 66"})


@pytest.mark.parametrize(
    "body",
    [{"prompt": "a"}, {"prompt": [1, 2]}, {"prompt": ["a"]}, {"prompt": [[1]], "n": 1}, {"prompt": "a", "n": "two"},
     {"prompt": "a", "n": MOST_OUTPUTS + 1}, {}, {"prompt": [], "n": 0}],
)  # fmt: skip
def test_what_has_one_output_or_too_many_is_left_as_it_is(body: dict[str, Any]) -> None:
    assert singles(PATH, body) == ([], 1)


def test_only_completions_are_taken_apart() -> None:
    assert singles("/v1/chat/completions", {"prompt": "a", "n": 2}) == ([], 1)
    calls, n = singles(PATH, {"prompt": ["a", "b"], "n": 2, "echo": True})
    assert [call["prompt"] for call in calls] == ["a", "a", "b", "b"]
    assert {(call["n"], call["echo"]) for call in calls} == {(1, True)}
    assert n == 2


def test_cached_tokens_are_counted_once_for_each_prompt() -> None:
    def told(prompt: int, cached: int | None) -> bytes:
        details = None if cached is None else {"cached_tokens": cached}
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": 2,
            "reasoning_tokens": 1,
            "prompt_tokens_details": details,
        }
        return msgspec.json.encode({"choices": [{"index": 0}], "usage": usage})

    merged = msgspec.json.decode(merge([told(5, None), told(5, 4), told(7, 6), told(7, 7)], 2))
    assert merged["usage"] == {
        "prompt_tokens": 12, "completion_tokens": 8, "reasoning_tokens": 4, "total_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 6},
    }  # fmt: skip

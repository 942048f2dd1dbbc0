"""From a server's labels to a stored group's versions: a front door, a shim, and environments that know of neither.

They take from an answer what atroposlib takes: token ids and log-probs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest
import roles
import uvicorn
from aiohttp import web
from doors import Upstream, door

from lachesis.broker import Broker
from lachesis.broker.records.groups import Group
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio

TRAINER = {
    "wandb_group": "g", "wandb_project": "p", "batch_size": 4, "max_token_len": 512, "checkpoint_dir": "",
    "save_checkpoint_interval": 1, "starting_step": 0, "num_steps": 9,
}  # fmt: skip


@asynccontextmanager
async def shim(broker: Broker) -> AsyncIterator[aiohttp.ClientSession]:
    listener = roles.listener()
    server = uvicorn.Server(uvicorn.Config(build_app(broker, ShimSettings()), lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        async with client.post("/register", json=TRAINER) as response:
            assert response.status == 200
        yield client
        server.should_exit = True
    await serving
    listener.close()


class Labelling:
    """Generates at random under weights that are newer at every call, and in the middle of every other one.

    `made` tells of each sequence of ids, prompt and output, the version and log-prob of its output's tokens.
    """

    def __init__(self) -> None:
        self.rng, self.version = random.Random(0), 0
        self.made: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    async def __call__(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if request.path != "/generate":
            raise web.HTTPNotFound
        ids = body.get("input_ids") or list(body["text"].encode())
        told = [self._generate(ids, body) for _ in range(body["sampling_params"].get("n", 1))]
        return web.json_response(told if len(told) > 1 else told[0])

    def _generate(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        count = self.rng.randint(1, 9)
        cut = self.rng.randint(1, count) if self.version % 2 else count
        output = [self.rng.randrange(256) for _ in range(count)]
        log_probs = np.array([-self.rng.random() for _ in output], "<f4").tolist()
        versions = [self.version + (index >= cut) for index in range(count)]
        self.made[tuple(ids + output)] = list(zip(versions, log_probs, strict=True))
        spans = [(self.version, 0, cut), (self.version + 1, cut, count)]
        meta: dict[str, Any] = {
            "finish_reason": {"type": "stop"},
            "weight_version": str(versions[-1]),
            "weight_versions": [{"version": str(v), "start": a, "end": b} for v, a, b in spans if a < b],
        }
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [
                [value, token, None] for value, token in zip(log_probs, output, strict=True)
            ]
        told = {"text": "", "output_ids": output, "meta_info": meta}
        return told | ({"prompt_token_ids": ids} if body.get("return_prompt_token_ids") else {})


class Sequence:
    """One sequence as an environment keeps it, turn for turn."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens, self.masks, self.log_probs = list(prompt), [-100] * len(prompt), [1.0] * len(prompt)

    def observe(self, ids: list[int]) -> None:
        self.tokens += ids
        self.masks += [-100] * len(ids)
        self.log_probs += [1.0] * len(ids)

    def generated(self, ids: list[int], log_probs: list[float]) -> None:
        self.tokens += ids
        self.masks += ids
        self.log_probs += log_probs


async def generate(client: aiohttp.ClientSession, prompt: list[int], n: int = 1) -> list[list[tuple[float, int]]]:
    """(log-prob, id) of each output token, of each of n outputs: all that atroposlib reads of an answer."""
    body = {"input_ids": prompt, "sampling_params": {"n": n}, "return_logprob": True, "return_text_in_logprobs": False}
    async with client.post("/generate", json=body) as response:
        assert response.status == 200
        told = await response.json()
    answers = told if isinstance(told, list) else [told]
    return [[(token[0], token[1]) for token in each["meta_info"]["output_token_logprobs"]] for each in answers]


async def post_group(client: aiohttp.ClientSession, sequences: list[Sequence], **more: Any) -> None:
    body = {
        "tokens": [each.tokens for each in sequences],
        "masks": [each.masks for each in sequences],
        "scores": [float(index) for index in range(len(sequences))],
        **more,
    }
    async with client.post("/scored_data", json=body) as response:
        assert response.status == 200, await response.text()


async def newest(broker: Broker) -> Group:
    (_, entry), *_ = reversed(await broker.queue.queued())
    [group] = await broker.queue.fetch([entry.gid])
    assert (entry.v_min, entry.v_max) == (group.v_min, group.v_max)
    return group


async def counts(client: aiohttp.ClientSession) -> dict[str, int]:
    async with client.get("/healthz") as response:
        return (await response.json())["lineage"]


def truth(server: Labelling, sequence: Sequence) -> list[tuple[int, float] | None]:
    """Version and log-prob of each token, None where it was not generated: what the server knows of every prefix."""
    found: list[tuple[int, float] | None] = [None] * len(sequence.tokens)
    for end in range(1, len(found) + 1):
        made = server.made.get(tuple(sequence.tokens[:end]))
        if made is not None:
            found[end - len(made) : end] = made
    return found


def per_token(group: Group, index: int) -> list[int | None]:
    assert group.versions is not None
    found: list[int | None] = [None] * len(group.tokens[index])
    for version, start, end in group.versions[index]:
        found[start:end] = [version] * (end - start)
    return found


def check(server: Labelling, group: Group, sequences: list[Sequence]) -> None:
    """Every version that is stored is the true one, and there are as many as there are generated tokens."""
    true = [truth(server, sequence) for sequence in sequences]
    assert [per_token(group, index) for index in range(len(sequences))] == [
        [None if made is None else made[0] for made in row] for row in true
    ]
    versions = [made[0] for row in true for made in row if made is not None]
    assert (group.v_min, group.v_max) == (min(versions), max(versions))


async def test_an_unmodified_single_turn_environment(broker: Broker) -> None:
    server = Labelling()
    async with Upstream(broker, "s", server).running(), door(broker) as client, shim(broker) as api:
        for number in range(5):
            sequences = []
            for output in await generate(client, [number, 1, 2], n=2):
                sequence = Sequence([number, 1, 2])
                sequence.generated([token for _, token in output], [value for value, _ in output])
                sequences.append(sequence)
            await post_group(api, sequences, inference_logprobs=[each.log_probs for each in sequences])
            group = await newest(broker)
            check(server, group, sequences)
            assert group.sampled_logprobs is None  # it sent its own
        assert await counts(api) == {"joined": 10, "unknown": 0, "mismatched": 0, "sent": 0}


async def test_an_unmodified_multi_turn_environment_that_sends_no_log_probs(broker: Broker) -> None:
    server = Labelling()
    async with Upstream(broker, "s", server).running(), door(broker) as client, shim(broker) as api:
        sequences = [Sequence([9, 9]), Sequence([9, 8])]
        for turn in range(4):
            for sequence in sequences:
                sequence.observe([50 + turn])
                [output] = await generate(client, sequence.tokens)
                sequence.generated([token for _, token in output], [value for value, _ in output])
        await post_group(api, sequences)
        group = await newest(broker)
        check(server, group, sequences)
        assert group.sampled_logprobs is not None
        assert [row.tolist() for row in group.sampled_logprobs] == [each.log_probs for each in sequences]
        assert (await counts(api))["joined"] == 2


async def test_a_text_environment_that_asks_for_no_log_probs(broker: Broker) -> None:
    server = Labelling()
    async with Upstream(broker, "s", server).running(), door(broker) as client, shim(broker) as api:
        async with client.post("/generate", json={"text": "hi", "sampling_params": {}}) as response:
            told = await response.json()
        assert set(told) == {"text", "output_ids", "meta_info"}
        assert set(told["meta_info"]) == {"finish_reason", "weight_version", "weight_versions"}
        sequence = Sequence(list(b"hi"))
        sequence.generated(told["output_ids"], [])
        await post_group(api, [sequence])
        group = await newest(broker)
        check(server, group, [sequence])
        assert group.sampled_logprobs is not None
        made = server.made[tuple(sequence.tokens)]
        assert group.sampled_logprobs[0].tolist() == [1.0, 1.0, *(value for _, value in made)]


async def test_what_an_environment_changed_is_unknown_or_mismatched(broker: Broker) -> None:
    server = Labelling()
    async with Upstream(broker, "s", server).running(), door(broker) as client, shim(broker) as api:
        changed, scaled = Sequence([1]), Sequence([2])
        for sequence in (changed, scaled):
            [output] = await generate(client, sequence.tokens)
            sequence.generated([token for _, token in output], [value for value, _ in output])
        changed.tokens[0] = 7
        scaled.log_probs = [value / 2 if value <= 0 else value for value in scaled.log_probs]
        await post_group(api, [changed, scaled], inference_logprobs=[changed.log_probs, scaled.log_probs])
        group = await newest(broker)
        assert group.versions is not None
        assert group.versions[0] == ()
        assert per_token(group, 1)[1:] == [version for version, _ in server.made[tuple(scaled.tokens)]]
        # the policy's newest version is 0 and its one server serves 4: these bounds count too
        assert (group.v_min, group.v_max) == (0, server.version)
        assert await counts(api) == {"joined": 1, "unknown": 1, "mismatched": 1, "sent": 0}


async def test_versions_that_an_environment_sends_itself_are_those_that_are_joined(broker: Broker) -> None:
    server = Labelling()
    async with Upstream(broker, "s", server).running(), door(broker) as client, shim(broker) as api:
        body = {"input_ids": [5, 6], "sampling_params": {}, "return_logprob": True}
        async with client.post("/generate", json=body) as response:
            told = await response.json()
        sequence = Sequence([5, 6])
        sequence.generated(told["output_ids"], [])
        spans = [
            [int(span["version"]), 2 + span["start"], 2 + span["end"]] for span in told["meta_info"]["weight_versions"]
        ]
        await post_group(api, [sequence])
        joined = await newest(broker)
        await post_group(api, [sequence], weight_versions=[spans])
        sent = await newest(broker)
        assert sent.gid != joined.gid
        assert (sent.versions, sent.v_min, sent.v_max) == (joined.versions, joined.v_min, joined.v_max)
        assert await counts(api) == {"joined": 1, "unknown": 0, "mismatched": 0, "sent": 1}
        for wrong in ([], [[[1, 0, 99]]], [[[1, 2, 2]]], [[[-1, 0, 1]]], [[[1, 1, 2], [1, 0, 1]]]):
            group = {"tokens": [[1, 2]], "masks": [[1, 2]], "scores": [0.0], "weight_versions": wrong}
            async with api.post("/scored_data", json=group) as response:
                assert response.status == 422
                assert "weight_versions" in (await response.json())["detail"][0]["msg"]

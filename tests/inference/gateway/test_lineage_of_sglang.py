"""Every route of a real SGLang: what the front door records of it is what was generated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest
import roles
from doors import door
from published import make_model

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Lineage

pytestmark = [pytest.mark.anyio, pytest.mark.sglang]

RUN = "lineage-tests"
SAMPLING = {"max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture(scope="module")
def agent(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the Redis that an agent with its SGLang reports to."""
    folder = tmp_path_factory.mktemp("lineage")
    options = ("--redis-url", shared_redis.url, "--run", RUN, "--state-dir", str(folder), "--server", "s0")
    role = roles.agent(folder / "agent.log", *options, "--model", str(make_model(folder / "base")))
    yield shared_redis.url
    role.kill()


@pytest.fixture
async def broker(agent: str) -> AsyncIterator[Broker]:
    client = await Broker.connect(agent, RUN)
    yield client
    await client.aclose()


@pytest.fixture
async def client(broker: Broker) -> AsyncIterator[aiohttp.ClientSession]:
    async with door(broker, patience_s=120.0) as client:
        yield client


async def ask(client: aiohttp.ClientSession, path: str, **body: Any) -> Any:
    async with client.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def known(broker: Broker) -> int:
    """How many generations are recorded."""
    return len(set(await broker.redis.hkeys(broker.keys.lineage)) - {b"bytes", b"since"})


async def recorded(broker: Broker, prompt: list[int], output: list[int]) -> Lineage:
    [found] = await broker.lineage.look_up([tokens_digest(prompt + output)])
    assert found is not None
    assert (found.v_min, found.v_max, found.spans) == (0, 0, ((0, 0, len(output)),))
    return found


def log_probs(lineage: Lineage) -> list[float]:
    return list(map(float, memoryview(lineage.log_probs).cast("f")))


async def test_generate(broker: Broker, client: aiohttp.ClientSession) -> None:
    prompt = [9, 10, 11]
    told = await ask(client, "/generate", input_ids=prompt, sampling_params=SAMPLING | {"n": 2}, return_logprob=True)
    for each in told:
        tokens = each["meta_info"]["output_token_logprobs"]
        found = await recorded(broker, prompt, [token[1] for token in tokens])
        assert log_probs(found) == pytest.approx([token[0] for token in tokens], abs=1e-6)


async def test_generate_from_text_hands_out_nothing_that_was_not_asked_for(
    broker: Broker, client: aiohttp.ClientSession
) -> None:
    plain = await ask(client, "/generate", text="abc", sampling_params=SAMPLING)
    asked = await ask(client, "/generate", text="abc", sampling_params=SAMPLING, return_prompt_token_ids=True)
    assert "prompt_token_ids" not in plain
    assert not [key for key in plain["meta_info"] if "logprob" in key]
    found = await recorded(broker, asked["prompt_token_ids"], plain["output_ids"])
    assert len(log_probs(found)) == len(plain["output_ids"])


async def test_a_stream_of_generate(broker: Broker, client: aiohttp.ClientSession) -> None:
    body = {"input_ids": [20, 21], "sampling_params": SAMPLING, "stream": True, "return_logprob": True}
    async with client.post("/generate", json=body) as response:
        raw = await response.read()
    *_, last, done = [event for event in raw.split(b"\n\n") if event]
    assert done == b"data: [DONE]"
    told = msgspec.json.decode(last.removeprefix(b"data: "))
    found = await recorded(broker, [20, 21], told["output_ids"])
    assert log_probs(found) == pytest.approx(
        [token[0] for token in told["meta_info"]["output_token_logprobs"]], abs=1e-6
    )


@pytest.mark.parametrize(
    ("path", "prompt", "output"),
    [("/v1/completions", {"prompt": "abc"}, "token_ids"),
     ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}, "response_token_ids")],
)  # fmt: skip
async def test_the_openai_routes(
    broker: Broker, client: aiohttp.ClientSession, path: str, prompt: dict[str, Any], output: str
) -> None:
    common = {"model": "m", "max_tokens": 12, "temperature": 1.0, **prompt}
    [asked] = (await ask(client, path, **common, return_token_ids=True))["choices"]
    found = await recorded(broker, asked["prompt_token_ids"], asked[output])
    assert len(log_probs(found)) == len(asked[output])
    assert asked["logprobs"] is None
    [plain] = (await ask(client, path, **common))["choices"]
    assert not {"token_ids", "response_token_ids", "prompt_token_ids", "meta_info"} & set(plain)
    assert plain["logprobs"] is None


async def test_several_outputs_of_a_chat(broker: Broker, client: aiohttp.ClientSession) -> None:
    body = {"model": "m", "max_tokens": 12, "n": 3, "messages": [{"role": "user", "content": "x"}]}
    told = await ask(client, "/v1/chat/completions", **body, return_token_ids=True, logprobs=True)
    for choice in told["choices"]:
        found = await recorded(broker, choice["prompt_token_ids"], choice["response_token_ids"])
        assert log_probs(found) == pytest.approx(
            [token["logprob"] for token in choice["logprobs"]["content"]], abs=1e-6
        )


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("abc", 1), (["abc", "de"], 2), ([40, 41], 1), ([[40, 41], [42]], 2)], ids=str
)
async def test_several_outputs_of_completions(
    broker: Broker, client: aiohttp.ClientSession, prompt: Any, prompts: int
) -> None:
    body = {"model": "m", "max_tokens": 12, "temperature": 1.0, "n": 2, "prompt": prompt}
    told = await ask(client, "/v1/completions", **body, return_token_ids=True, logprobs=0)
    asked = [choice["prompt_token_ids"] for choice in told["choices"]]
    assert [choice["index"] for choice in told["choices"]] == list(range(2 * prompts))
    assert asked[::2] == asked[1::2]
    assert len({tuple(each) for each in asked}) == prompts
    for choice in told["choices"]:
        found = await recorded(broker, choice["prompt_token_ids"], choice["token_ids"])
        assert log_probs(found) == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-6)
    made = sum(len(choice["token_ids"]) for choice in told["choices"])
    read = sum(map(len, asked[::2]))
    usage = told["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (read, made, read + made)
    plain = await ask(client, "/v1/completions", **body)
    assert not {"token_ids", "prompt_token_ids"} & {key for choice in plain["choices"] for key in choice}


@pytest.mark.parametrize("prompts", [{"input_ids": [[50, 51], [52]]}, {"text": ["abc", "de"]}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
async def test_several_outputs_of_several_prompts(
    broker: Broker, client: aiohttp.ClientSession, prompts: dict[str, Any], stream: bool
) -> None:
    body = {**prompts, "sampling_params": SAMPLING | {"n": 2}, "return_logprob": True, "return_prompt_token_ids": True}
    if not stream:
        told = await ask(client, "/generate", **body)
    else:
        async with client.post("/generate", json=body | {"stream": True}) as response:
            raw = await response.read()
        pieces = [msgspec.json.decode(piece[6:]) for piece in raw.split(b"\n\n") if piece.startswith(b"data: {")]
        told = [piece for piece in pieces if piece["meta_info"]["finish_reason"]]
    assert len(told) == 4
    for each in told:
        found = await recorded(broker, each["prompt_token_ids"], each["output_ids"])
        given = [token[0] for token in each["meta_info"]["output_token_logprobs"]]
        assert log_probs(found) == pytest.approx(given, abs=1e-6)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/v1/completions", {"prompt": ["abc", "de"]}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]})],
)  # fmt: skip
async def test_streams_of_the_openai_routes(
    broker: Broker, client: aiohttp.ClientSession, path: str, prompt: dict[str, Any], asks: bool
) -> None:
    chat = "messages" in prompt
    wanted = ("return_input_ids_in_sglext", "return_output_ids_in_sglext") if chat else ("return_token_ids",)
    common = {"model": "m", "max_tokens": 12, "temperature": 1.0, "n": 2, "stream": True, "ignore_eos": True, **prompt}
    before = await known(broker)
    body = common | {"logprobs": True if chat else 0} | dict.fromkeys(wanted, asks)
    async with client.post(path, json=body) as response:
        raw = await response.read()
    *pieces, done = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    assert done == b"[DONE]"
    outputs = 2 if chat else 4
    assert await known(broker) == before + outputs
    chunks = [msgspec.json.decode(piece) for piece in pieces]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    told = [chunk["sglext"] for chunk in chunks if chunk.get("sglext")]
    if not asks:
        assert not told
        assert not [choice for choice in choices if choice.get("token_ids") or choice.get("prompt_token_ids")]
        return
    for index in range(outputs):
        mine = [choice for choice in choices if choice["index"] == index]
        if chat:
            [ids] = told
            prompt_ids, output_ids = ids["input_ids"], ids["output_ids"][index]
            values = [token["logprob"] for each in mine for token in (each["logprobs"] or {"content": []})["content"]]
        else:
            prompt_ids = mine[0]["prompt_token_ids"]
            output_ids = [token for each in mine for token in each["token_ids"]]
            values = [
                value for each in mine for value in (each["logprobs"] or {"token_logprobs": []})["token_logprobs"]
            ]
        found = await recorded(broker, prompt_ids, output_ids)
        if chat and len(values) < len(output_ids):  # SGLang leaves out what adds no text, such as half a character
            values = []
        assert log_probs(found) == pytest.approx(values, abs=1e-6)


async def test_vllms_shape(broker: Broker, client: aiohttp.ClientSession) -> None:
    prompt = [30, 31, 32]
    body = {"prompt": {"prompt_token_ids": prompt}, "logprobs": 0, "n": 2, "max_tokens": 12, "temperature": 1.0}
    told = await ask(client, "/generate", **body)
    assert set(told["finish_reasons"]) <= {"length", "stop"}
    for positions in told["logprobs"]:
        ids = [int(next(iter(position[0]))) for position in positions]
        found = await recorded(broker, prompt, ids)
        assert log_probs(found) == pytest.approx([next(iter(position[0].values())) for position in positions], abs=1e-6)
    scored = await ask(client, "/generate", prompt={"prompt_token_ids": prompt}, prompt_logprobs=2, max_tokens=1)
    first, *others = scored["prompt_logprobs"]
    assert first is None
    assert [str(token) in entry and len(entry) in (2, 3) for token, entry in zip(prompt[1:], others, strict=True)] == [
        True,
        True,
    ]


async def test_nothing_was_lost(client: aiohttp.ClientSession) -> None:
    with anyio.fail_after(60):
        async with client.get("/health") as response:
            assert (await response.json())["lineage_lost"] == 0

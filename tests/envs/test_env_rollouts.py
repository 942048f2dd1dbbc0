"""The Atropos environments against real HTTP servers: what a group holds, and that upstream's API makes a batch of them."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from completion_server import TinyModel
from ports import free_port

from lachesis.envs.main import make_env
from lachesis.envs.registry import entry
from lachesis.envs.settings import EnvSettings
from lachesis.envs.task import Problem

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
PROMPT_MASK, PROMPT_LOGPROB = -100, 1.0  # what Atropos puts where nothing was sampled
BATCH, GROUP = 16, 4


def environment(inference: str, folder: Path, **settings: Any) -> Any:
    chosen = EnvSettings(front_door_url=inference, model=str(folder), group_size=GROUP, **settings)
    return make_env(chosen, entry(chosen.name).env_class())


@pytest.fixture
def gsm8k_file(tmp_path: Path) -> str:
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"{number} and 1?", "answer": f"#### {number + 1}"} for number in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def check_alignment(group: Any, prompt: list[int], tiny: TinyModel) -> None:
    """Tokens, masks and log-probs of each sequence agree with each other, and with the model that sampled them."""
    assert len(group["tokens"]) == GROUP
    for tokens, mask, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True):
        start = len(prompt)
        assert tokens[:start] == prompt
        assert mask == [PROMPT_MASK] * start + tokens[start:]
        assert logprobs[:start] == [PROMPT_LOGPROB] * start
        assert len(logprobs) == len(tokens) > start
        with torch.no_grad():
            expected = torch.log_softmax(tiny.model(torch.tensor([tokens])).logits[0, :-1], -1)
        for position in range(start, len(tokens)):
            assert math.isclose(logprobs[position], expected[position - 1, tokens[position]], abs_tol=1e-4)


async def test_a_token_in_the_front_doors_address_is_sent(inference: str, model_folder: Path, tiny: TinyModel) -> None:
    env = environment(inference.replace("://", "://x:lachesis_t@"), model_folder, name="arithmetic")
    await env.setup()
    await env.collect_trajectories(await env.get_next_item())
    assert tiny.authorizations == {"Bearer lachesis_t"}


async def test_a_group_is_aligned_and_its_scores_are_the_grader_s(
    inference: str, model_folder: Path, tiny: TinyModel
) -> None:
    env = environment(inference, model_folder, name="arithmetic")
    await env.setup()
    eos = tiny.tokenizer.eos_token_id
    ended = 0
    for _ in range(4):
        problem = await env.get_next_item()
        group, backlog = await env.collect_trajectories(problem)
        prompt = tiny.tokenizer.encode(problem.prompt)
        check_alignment(group, prompt, tiny)
        assert backlog == []
        for tokens, score in zip(group["tokens"], group["scores"], strict=True):
            answer = tokens[len(prompt) :]
            ended += answer[-1] == eos
            right = [*tiny.tokenizer.encode(problem.answer), eos]
            assert score == float(answer == right)
    calls = [body for path, body in tiny.calls if path == "generate"]
    assert len(calls) == 4
    assert {call["sampling_params"]["n"] for call in calls} == {GROUP}
    assert {call["sampling_params"]["temperature"] for call in calls} == {1.0}
    assert ended  # EOS came with its log-prob, and was checked above


async def test_a_right_answer_scores_one(inference: str, model_folder: Path, tiny: TinyModel) -> None:
    env = environment(inference, model_folder, name="arithmetic")
    await env.setup()
    problem = Problem("max", "max 37 52=", "52")
    sampled = iter([["52", True], ["37", True], ["52", False], ["5", True]])

    def sample(prompt: list[int], count: int, temperature: float) -> list[list[tuple[float, int]]]:
        answers = []
        for _ in range(count):
            text, ends = next(sampled)
            ids = tiny.tokenizer.encode(text) + ([tiny.tokenizer.eos_token_id] if ends else tiny.tokenizer.encode("2"))
            answers.append([(-0.5, token) for token in ids])
        return answers

    tiny.sample, kept = sample, tiny.sample  # type: ignore[method-assign]
    try:
        group, _ = await env.collect_trajectories(problem)
    finally:
        tiny.sample = kept  # type: ignore[method-assign]
    assert group["scores"] == [1.0, 0.0, 0.0, 0.0]


async def test_a_chat_prompt_is_the_template_s_tokens(
    inference: str, model_folder: Path, tiny: TinyModel, gsm8k_file: str
) -> None:
    env = environment(inference, model_folder, name="gsm8k", data=gsm8k_file, max_new_tokens=7)
    await env.setup()
    problem = await env.get_next_item()
    group, _ = await env.collect_trajectories(problem)
    text = tiny.tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}], tokenize=False, add_generation_prompt=True
    )
    check_alignment(group, tiny.tokenizer.encode(text), tiny)
    [(path, body)] = tiny.calls
    assert path == "generate"
    assert body["sampling_params"]["max_new_tokens"] == 7


async def test_an_evaluation_is_greedy_and_reported_once(
    inference: str, model_folder: Path, tiny: TinyModel, tmp_path: Path
) -> None:
    env = environment(inference, model_folder, name="arithmetic")
    env.config.eval_problems, env.config.data_dir_to_save_evals = 12, str(tmp_path)
    await env.setup()
    await env.evaluate()
    asked = [body for path, body in tiny.calls if path == "completions"]
    held_out = [problem.prompt for problem in env.task.held_out()[:12]]
    assert sorted(body["prompt"] for body in asked) == sorted(held_out)
    assert {body["temperature"] for body in asked} == {0.0}
    expected = sum(
        env.task.score(problem, tiny.text(tiny.sample(tiny.tokenizer.encode(problem.prompt), 1, 0.0)[0]))
        for problem in env.task.held_out()[:12]
    )
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["results"]["all"] == {"eval/accuracy": expected / 12}
    reported: list[dict[str, Any]] = []

    async def table(metrics: dict[str, Any]) -> dict[str, Any]:
        reported.append(dict(metrics))
        return metrics

    env.create_rollout_table = table
    await env.wandb_log({})
    await env.wandb_log({})
    assert [metrics.get("eval/accuracy") for metrics in reported] == [expected / 12, None]


# -- upstream's own server ----------------------------------------------------------------------------------------


@pytest.fixture
def run_api(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [str(Path(sys.executable).parent / "run-api"), "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "run-api.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(url).raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


async def test_upstream_s_server_makes_a_batch_of_what_it_posts(
    inference: str, model_folder: Path, tiny: TinyModel, run_api: str
) -> None:
    trainer = {
        "wandb_group": "g",
        "wandb_project": "p",
        "batch_size": BATCH,
        "max_token_len": 32,
        "checkpoint_dir": "",
        "save_checkpoint_interval": 0,
        "starting_step": 0,
        "num_steps": 100,
    }
    env = environment(inference, model_folder, name="arithmetic", shim_url=run_api)
    async with httpx.AsyncClient(base_url=run_api, timeout=120) as client:
        (await client.post("/register", json=trainer)).raise_for_status()
        assert (await client.get("/batch")).json() == {"batch": None}  # tells the server that training began
        running = asyncio.create_task(env.env_manager())
        try:
            batch = None
            async with asyncio.timeout(60):
                while batch is None:
                    assert not running.done(), running.result()
                    await asyncio.sleep(0.1)
                    batch = (await client.get("/batch")).json()["batch"]
        finally:
            running.cancel()
    assert sum(len(group["tokens"]) for group in batch) == BATCH
    prompts = {problem.prompt for problem in env.task.held_out()}
    for group in batch:
        start = group["masks"][0].count(PROMPT_MASK)
        prompt = group["tokens"][0][:start]
        check_alignment(group, prompt, tiny)
        assert group["env_id"] == 0
        assert tiny.tokenizer.decode(prompt) not in prompts

"""Held-out accuracy of whatever a front door serves: greedy answers over HTTP, graded here. No atroposlib."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import anyio
import httpx
from msgspec import Struct

from lachesis.broker.errors import LachesisError
from lachesis.envs.registry import entry
from lachesis.envs.settings import split_token
from lachesis.envs.task import Problem, Task

CONCURRENCY = 8
PROMPTS_PER_CALL = 25
TIMEOUT_S = 600.0


class EvaluationFailed(LachesisError, RuntimeError):
    """The front door gave no answer."""


class Evaluation(Struct):
    """Outcome of one evaluation."""

    accuracy: float
    n: int
    seconds: float
    per_kind: dict[str, float]
    examples: list[tuple[str, str, str]]  # (prompt, text, right answer), wrong ones first


def evaluate(
    front_door_url: str, name: str, model: str = "policy", *, data: str | None = None, limit: int = 500
) -> Evaluation:
    """Ask `limit` held-out problems of environment `name`. Raises EvaluationFailed if the front door refuses."""
    url, token = split_token(front_door_url.rstrip("/"))
    return anyio.run(_evaluate, url, token, entry(name).task(data), model or "policy", limit)


async def _evaluate(url: str, token: str, task: Task, model: str, limit: int) -> Evaluation:
    began = time.monotonic()
    problems = list(task.held_out()[:limit])
    size = 1 if task.chat else PROMPTS_PER_CALL
    chunks = [problems[start : start + size] for start in range(0, len(problems), size)]
    texts: list[list[str]] = [[] for _ in chunks]
    limiter = anyio.CapacityLimiter(CONCURRENCY)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(timeout=TIMEOUT_S, headers=headers) as client:

        async def ask(index: int) -> None:
            async with limiter:
                texts[index] = await _ask(client, url, task, model, chunks[index])

        try:
            async with anyio.create_task_group() as tasks:
                for index in range(len(chunks)):
                    tasks.start_soon(ask, index)
        except BaseExceptionGroup as group:
            error = group.exceptions[0]
            if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
                raise EvaluationFailed(
                    f"the front door at {url} gave no answer: {error or type(error).__name__}"
                ) from None
            if isinstance(error, ValueError | KeyError | TypeError):  # no JSON, or another one's
                raise EvaluationFailed(f"what answers at {url} is no front door: {error!r}") from None
            raise error from None
    answers = [text for chunk in texts for text in chunk]
    scores = [task.score(problem, text) for problem, text in zip(problems, answers, strict=True)]
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for problem, score in zip(problems, scores, strict=True):
        by_kind[problem.kind].append(score)
    order = sorted(range(len(problems)), key=lambda index: scores[index])
    return Evaluation(
        accuracy=sum(scores) / len(scores),
        n=len(problems),
        seconds=time.monotonic() - began,
        per_kind={kind: sum(values) / len(values) for kind, values in sorted(by_kind.items())},
        examples=[(problems[index].prompt, answers[index], problems[index].answer) for index in order[:10]],
    )


async def _ask(client: httpx.AsyncClient, url: str, task: Task, model: str, problems: Sequence[Problem]) -> list[str]:
    common = {"model": model, "temperature": 0.0, "max_tokens": task.max_new_tokens}
    if task.chat:
        body = common | {"messages": [{"role": "user", "content": problems[0].prompt}]}
        answer = await client.post(f"{url}/v1/chat/completions", json=body)
        answer.raise_for_status()
        return [choice["message"]["content"] or "" for choice in answer.json()["choices"]]
    answer = await client.post(
        f"{url}/v1/completions", json=common | {"prompt": [problem.prompt for problem in problems]}
    )
    answer.raise_for_status()
    choices = sorted(answer.json()["choices"], key=lambda choice: int(choice["index"]))
    return [choice["text"] for choice in choices]

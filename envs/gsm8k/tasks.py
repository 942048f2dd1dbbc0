"""GSM8K: word problems whose answer is a number, checked by value. Cobbe et al., 2021 (arXiv:2110.14168)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lachesis.broker.errors import ConfigurationError
from lachesis.envs.task import Problem, Recipe

DATASET = "openai/gsm8k"
INSTRUCTION = "Solve the problem step by step. Put the final number into \\boxed{}.\n\n"
HELD_OUT_SHARE = 10  # of a file: one problem in so many
NUMBER = re.compile(r"-?\d[\d,]{0,20}(?:\.\d{1,20})?")
HARMLESS_COMMAND = re.compile(r"\\(?:[dt]?frac|text(?:bf)?|math(?:rm|bf)|times|cdot|left|right|[ ,;:$%])(?![a-zA-Z])")
LAST_CHARS = 1000  # of an answer without a box, searched for its last number
LONGEST_ANSWER = 60  # characters in a box


class Gsm8k:
    """The data set from the Hugging Face hub, or from a file of JSON lines with `question` and `answer`."""

    chat = True
    max_new_tokens = 512

    def __init__(self, data: str | None) -> None:
        if data:
            problems = [_problem(row) for row in _rows(data)]
            self._train = [problem for problem in problems if not _is_held_out(problem)]
            self._held_out = [problem for problem in problems if _is_held_out(problem)]
        else:
            self._train, self._held_out = _from_hub("train"), _from_hub("test")
        if not self._train or not self._held_out:
            raise ConfigurationError(
                f"data = {data!r}: {len(self._train)} problems to train on, {len(self._held_out)} held out"
            )

    def training(self, seed: int) -> Iterator[Problem]:
        """Every problem once, in an order the seed decides, then again in another."""
        rng = random.Random(seed)
        while True:
            yield from rng.sample(self._train, len(self._train))

    def held_out(self) -> Sequence[Problem]:
        return self._held_out

    def score(self, problem: Problem, text: str) -> float:
        """1 where the last \\boxed{} (without one, the last number) equals the answer by value, else 0."""
        from math_verify import parse, verify

        given = final_answer(text)
        if given is None:
            return 0.0
        # math-verify's own timeouts are signals, which only a main thread has: what is parsed is bounded instead
        right, found = (parse(f"\\boxed{{{one}}}", parsing_timeout=None) for one in (problem.answer, given))
        return float(verify(right, found, timeout_seconds=None))


def final_answer(text: str) -> str | None:
    """What a text gives as its answer, or None where that can't be a number written out.

    Powers, factorials and functions are refused because evaluating one, say 9^{9^{9}} or \\Gamma(10^7), need never end.
    """
    opening = text.rfind("\\boxed{")
    if opening < 0:
        numbers = NUMBER.findall(text[-LAST_CHARS:])
        return numbers[-1] if numbers else None
    start = opening + len("\\boxed{")
    depth = 1
    for end in range(start, min(len(text), start + LONGEST_ANSWER + 1)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            given = text[start:end].replace("\\!", "").rstrip(".")  # \! is a negative space, as in 1,\!200
            plain = HARMLESS_COMMAND.sub(" ", given)
            return None if any(sign in plain for sign in ("^", "!", "\\")) else given
    return None


def make_task(data: str | None) -> Gsm8k:
    return Gsm8k(data)


def _rows(data: str) -> list[Any]:
    path = Path(data)
    if not path.is_file():
        raise ConfigurationError(f"data = {data!r}: no such file")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"data = {data!r}: can't be read as text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigurationError(f"data = {data!r}: line {number} is not JSON: {error}") from None
    return rows


def _from_hub(split: str) -> list[Problem]:
    from datasets import load_dataset

    try:
        rows = load_dataset(DATASET, "main", split=split)
    except Exception as error:  # whatever keeps it from being fetched
        raise ConfigurationError(
            f"{DATASET} can't be had from the Hugging Face hub ({type(error).__name__}); give a file of it with --data"
        ) from error
    return [_problem(row) for row in rows]


def _problem(row: dict[str, Any]) -> Problem:
    try:
        question, answer = str(row["question"]), str(row["answer"])
        number = answer.rsplit("####", 1)[1].strip().replace(",", "")
    except (TypeError, KeyError, IndexError):
        raise ConfigurationError(
            f"data: {str(row)[:80]!r}: needs `question`, and `answer` ending in '#### <number>'"
        ) from None
    return Problem("gsm8k", INSTRUCTION + question, number)


def _is_held_out(problem: Problem) -> bool:
    return int.from_bytes(sha256(problem.prompt.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


RECIPE = Recipe(
    steps=200,
    batch_size=256,
    group_size=8,
    max_token_len=1024,
    context_length=1024,
    max_workers=64,
    max_batches_offpolicy=1,
    trainer={"actor_rollout_ref.actor.optim.lr": 1e-6, "actor_rollout_ref.actor.clip_ratio_high": 0.28},
)

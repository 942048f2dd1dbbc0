"""What a single-turn task is: an endless stream of problems to train on, a fixed set held out, and a grader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


class Problem(NamedTuple):
    """One question and its right answer."""

    kind: str
    prompt: str
    answer: str


class Task(Protocol):
    """Held-out problems never occur in the training stream; a seed decides the stream, never the split."""

    chat: bool  # whether the prompt is a user's message, put into the model's chat template
    max_new_tokens: int

    def training(self, seed: int) -> Iterator[Problem]: ...

    def held_out(self) -> Sequence[Problem]: ...

    def score(self, problem: Problem, text: str) -> float:
        """Reward of an answer, from 0 to 1."""
        ...


@dataclass(frozen=True)
class Recipe:
    """Settings that train a task well; `trainer` holds Hydra overrides under verl's names."""

    steps: int
    batch_size: int  # sequences a step
    group_size: int
    max_token_len: int  # prompt and answer, in tokens
    context_length: int  # of the inference server
    max_workers: int  # groups generated at the same time
    max_batches_offpolicy: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)

"""Problems on short numbers, of two kinds that ask for different skills.

`max 37 52=` wants the larger of two numbers from 00 to 99, `rev 482=` a three-digit number backwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain, zip_longest

from lachesis.broker.errors import ConfigurationError
from lachesis.envs.task import Problem, Recipe

KINDS = ("max", "rev")
HELD_OUT_SHARE = 10  # one problem in so many


class Arithmetic:
    """The answer alone is right: two digits for `max`, three for `rev`, and nothing after them."""

    chat = False
    max_new_tokens = 4

    def training(self, seed: int) -> Iterator[Problem]:
        """An endless stream, both kinds equally often; no problem of it is held out."""
        rng = random.Random(seed)
        while True:
            if rng.random() < 0.5:
                problem = larger(rng.randrange(100), rng.randrange(100))
            else:
                problem = reversed_number(rng.randrange(1000))
            if not is_held_out(problem):
                yield problem

    def held_out(self) -> Sequence[Problem]:
        """Every held-out problem, always in the same order; the kinds take turns while there are some of both."""
        pairs = sorted(filter(is_held_out, (larger(a, b) for a in range(100) for b in range(100))), key=_digest)
        numbers = sorted(filter(is_held_out, map(reversed_number, range(1000))), key=_digest)
        return [problem for problem in chain.from_iterable(zip_longest(pairs, numbers)) if problem]

    def score(self, problem: Problem, text: str) -> float:
        """1 for exactly the answer, else 0."""
        return float(text == problem.answer)


def make_task(data: str | None = None) -> Arithmetic:
    if data:
        raise ConfigurationError(f"data = {data!r}: arithmetic makes its problems and takes no file")
    return Arithmetic()


def larger(a: int, b: int) -> Problem:
    return Problem("max", f"max {a:02d} {b:02d}=", f"{max(a, b):02d}")


def reversed_number(number: int) -> Problem:
    return Problem("rev", f"rev {number:03d}=", f"{number:03d}"[::-1])


def numbers_of(problem: Problem) -> list[str]:
    """The numbers a problem names, as written."""
    return problem.prompt.removesuffix("=").split()[1:]


def wrong_answer(problem: Problem) -> str:
    """The plausible mistake: the smaller number, or the number as it stands."""
    return min(numbers_of(problem))


def is_held_out(problem: Problem) -> bool:
    """Decided by the problem alone, so that no seed moves it; `max 12 34` and `max 34 12` go together."""
    return int.from_bytes(_digest(problem)[:4], "big") % HELD_OUT_SHARE == 0


def _digest(problem: Problem) -> bytes:
    return sha256(" ".join((problem.kind, *sorted(numbers_of(problem)))).encode()).digest()


RECIPE = Recipe(
    steps=80,
    batch_size=256,
    group_size=8,
    max_token_len=32,
    context_length=64,
    max_workers=32,
    max_batches_offpolicy=1,
    trainer={
        "actor_rollout_ref.actor.optim.lr": 5e-4,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.min_lr_ratio": 0.1,
        "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    },
)

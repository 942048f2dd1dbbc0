"""A known optimum is found however old the samples are, if the correction is on; and is not, if it is off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from bandit import Bandit
from trainer_kit import make_tiny_model

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.engine.verl_engine import Engine

pytestmark = pytest.mark.verl

REWARDS = torch.tensor([0.8, 0.8, 0.8, 0.8, 1.0, 0.8, 0.8, 0.8])  # the first policy's regret: 0.175
SEEDS, SEEDS_LONG = (0,), (0, 1, 2)
STEPS, SEQUENCES = 50, 64


@pytest.fixture(scope="module")
def uniform_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("bandit"), hidden=16, vocab_size=len(REWARDS), spread=0.02)


@pytest.fixture(scope="module")
def regrets(
    built: Callable[..., tuple[Engine, DictConfig]], uniform_model: Path, long_form: bool
) -> Callable[[str, int], list[float]]:
    """The final regrets with a correction and a lag, one per seed."""
    from lachesis.trainer.algo.learner import Learner

    @functools.cache
    def play(correction: str, lag: int) -> list[float]:
        found = []
        for seed in SEEDS_LONG if long_form else SEEDS:
            engine, config = built(f"correction={correction}", model=uniform_model)
            bandit = Bandit(engine, Learner(engine, config.algorithm), REWARDS, lag=lag, seed=seed)
            found.append(bandit.play(STEPS, sequences=SEQUENCES))
        print(f"{correction}, lag {lag}: {', '.join(f'{regret:.4f}' for regret in found)}")
        return found

    return play


@pytest.mark.parametrize("lag", [0, 4, 16])
def test_the_best_arm_is_found_however_old_the_samples_are(
    regrets: Callable[[str, int], list[float]], lag: int
) -> None:
    assert max(regrets("token_tis", lag)) < 0.06


def test_without_correction_it_is_not(regrets: Callable[[str, int], list[float]]) -> None:
    assert min(regrets("off", 16)) > max(regrets("token_tis", 16)) + 0.07

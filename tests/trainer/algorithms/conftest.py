"""Engines whose configuration is settled, and groups that an older policy sampled."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf
from same_step import Configured, Planned, batch, trained_a_little
from trainer_kit import scored_group, stored

from lachesis.broker.records.groups import Group
from lachesis.broker.records.packing import to_scored
from lachesis.trainer.config.plan import make_plan
from lachesis.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.engine.verl_engine import Engine


@pytest.fixture
def planned(configured: Configured, tmp_path: Path) -> Planned:
    """A fresh engine from the tiny model's weights, its configuration settled as main.py does it."""
    from lachesis.trainer.engine.verl_engine import build_engine

    def build(*presets: str, **values: Any) -> tuple[Engine, DictConfig]:
        config = configured(*presets)
        for name, value in values.items():
            OmegaConf.update(config, name, value)
        make_plan(config, TrainerSettings(state_dir=tmp_path))
        return build_engine(config), config

    return build


@pytest.fixture(scope="module")
def groups(built: Callable[..., Any]) -> list[Group]:
    """Six groups that an older policy sampled: some sequences exactly as this one, some a little off, some far."""
    from lachesis.trainer.algo.learner import Learner

    engine, config = built()
    trained_a_little(engine)
    rng = random.Random(7)
    found = [stored(scored_group(rng, turns=2)) for _ in range(6)]
    these = batch(found)
    log_probs = Learner(engine, config.algorithm).log_probs(these)[0]
    scored, row = [to_scored(group) for group in found], 0
    for group in scored:
        assert group.inference_logprobs
        for index, mask in enumerate(group.masks):
            spread = rng.choice([0.0, 1e-4, 0.1, 0.5])
            places = [place for place, value in enumerate(mask) if value != -100]
            for place in places:
                value = log_probs[row, place - places[0]].item() + rng.gauss(0, spread)
                group.inference_logprobs[index][place] = min(value, 0.0)
            row += 1
    return [stored(group) for group in scored]

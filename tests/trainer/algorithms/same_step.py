"""A step of ours beside the one that verl's own driver makes of the same groups, and what both begin with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from lachesis.broker.records.groups import Group
from lachesis.trainer.data.collate import to_batch

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.engine.verl_engine import Engine

CLOSE = 1e-6
MODES: dict[str, dict[str, Any]] = {
    "padded": {"actor_rollout_ref.model.use_remove_padding": False},
    "packed": {"actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 64},  # several micro-batches
}
Configured = Callable[..., "DictConfig"]
Planned = Callable[..., "tuple[Engine, DictConfig]"]


def half(*values: Collection[Any]) -> list[Any]:
    """Every combination, for parametrize; every second one is long.

    Of three, the last two of two values each, what is left holds every pair; of two, every value, and each mode with
    half of the others.
    """
    combinations = itertools.product(*(enumerate(one) for one in values))
    return [
        pytest.param(
            *(value for _, value in chosen), marks=pytest.mark.long if sum(index for index, _ in chosen) % 2 else ()
        )
        for chosen in combinations
    ]


def batch(groups: list[Group], **more: bool) -> Any:
    return to_batch(groups, vocab_size=320, max_tokens=64, **more)


def trained_a_little(engine: Engine) -> None:
    """Move the weights, each in the same way every time, so that they are no longer those of the reference."""
    generator = torch.Generator().manual_seed(0)
    for parameter in engine.worker.engine.module.parameters():
        if parameter.requires_grad:
            local = parameter.data.to_local()
            local += 0.01 * torch.randn(local.shape, generator=generator)


def recorded_step(engine: Engine, step: Callable[[], dict[str, float]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a step reports, and the gradients that the optimizer was about to apply."""
    inner, gradients = engine.worker.engine, {}
    optimizer_step = inner.optimizer_step

    def recording() -> float:
        for name, parameter in inner.module.named_parameters():
            if parameter.requires_grad:
                gradients[name] = parameter.grad.full_tensor().clone()
        found: float = optimizer_step()
        return found

    inner.optimizer_step = recording
    try:
        return step(), gradients
    finally:
        inner.optimizer_step = optimizer_step


def assert_same_step(
    planned: Planned, groups: list[Group], *presets: str, kept: list[Group] | None = None, **values: Any
) -> dict[str, float]:
    """Train `groups` by the Learner, and `kept` (or the same) by verl's driver. Returns the Learner's metrics."""
    from verl_driver import Driver

    from lachesis.trainer.algo.learner import Learner

    engine, config = planned(*presets, **values)
    trained_a_little(engine)
    learner = Learner(engine, config.algorithm)
    mine, my_gradients = recorded_step(engine, lambda: learner.step(batch(groups, distills=learner.distills)))
    engine, config = planned(*presets, **values)
    trained_a_little(engine)
    driver = Driver(engine.worker, config)
    theirs, their_gradients = recorded_step(engine, lambda: driver.step(kept or groups))

    assert mine["loss"] == pytest.approx(theirs.pop("actor/loss"), abs=CLOSE)
    assert mine["grad_norm"] == pytest.approx(theirs.pop("actor/grad_norm"), rel=CLOSE, abs=CLOSE)
    theirs.pop("actor/lr")  # verl's is the next step's
    compared = {
        name.removeprefix("actor/") if name.startswith("actor/rollout_corr/") else name: value
        for name, value in theirs.items()
        if not name.startswith(("actor/perf/", "actor/mfu"))
    }
    for name, value in compared.items():
        assert mine[name] == pytest.approx(value, rel=CLOSE, abs=CLOSE), name
    assert len(compared) >= 4
    assert my_gradients.keys() == their_gradients.keys()
    assert len(my_gradients) > 20
    for name, expected in their_gradients.items():
        assert (my_gradients[name] - expected).abs().max() <= CLOSE * max(1.0, float(expected.abs().max())), name
    assert max(gradient.abs().max() for gradient in my_gradients.values()) > 1e-3
    return mine

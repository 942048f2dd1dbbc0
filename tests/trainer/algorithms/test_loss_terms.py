"""Terms beside the policy's loss, by themselves: a step equals the one that verl's own driver makes of the same groups."""

from __future__ import annotations

import random
from typing import Any

import pytest
from same_step import MODES, Planned, assert_same_step, half
from trainer_kit import stored

from lachesis.broker.records.groups import Group
from lachesis.broker.records.packing import to_scored

pytestmark = pytest.mark.verl

KL_KINDS = ("kl", "abs", "mse", "low_var_kl", "k3+")


@pytest.mark.parametrize("mode", MODES)
def test_the_entropy_bonus_is_verls(planned: Planned, groups: list[Group], mode: str) -> None:
    values = MODES[mode] | {"actor_rollout_ref.actor.entropy_coeff": 0.01}
    mine = assert_same_step(planned, groups, **values)
    assert mine["actor/entropy_loss"] == pytest.approx(mine["entropy"], rel=1e-5)


@pytest.mark.parametrize(("kind", "mode"), half(KL_KINDS, MODES))
def test_kl_loss_against_the_reference_is_verls(planned: Planned, groups: list[Group], kind: str, mode: str) -> None:
    actor = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": kind}
    values = MODES[mode] | {f"actor_rollout_ref.actor.{name}": value for name, value in actor.items()}
    mine = assert_same_step(planned, groups, **values)
    assert abs(mine["actor/kl_loss"]) > 1e-3


@pytest.mark.parametrize(("algo", "mode"), half(["grpo", "reinforce_plus_plus", "rloo"], MODES))
def test_kl_in_the_reward_is_verls(planned: Planned, groups: list[Group], algo: str, mode: str) -> None:
    values = MODES[mode] | {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0.1}
    mine = assert_same_step(planned, groups, f"algo={algo}", **values)
    assert abs(mine["actor/reward_kl_penalty"]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_an_adapter_is_verls(planned: Planned, groups: list[Group], mode: str) -> None:
    """With the KL to the model without it, as in verl."""
    adapter: dict[str, Any] = {"actor_rollout_ref.model.lora_rank": 4, "actor_rollout_ref.actor.use_kl_loss": True}
    assert_same_step(planned, groups, **MODES[mode], **adapter)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rewards", [True, False])
def test_distillation_is_verls(planned: Planned, groups: list[Group], rewards: bool, mode: str) -> None:
    rng = random.Random(11)
    taught = []
    for group in groups:
        scored = to_scored(group)
        # as an inference server says it: for every token but the first, prompt included
        scored.distill_token_ids = [
            [rng.sample(range(250), 5) if place else [] for place in range(len(row))] for row in scored.tokens
        ]
        scored.distill_logprobs = [
            [[-rng.uniform(0.5, 4) for _ in ids] for ids in row] for row in scored.distill_token_ids
        ]
        taught.append(stored(scored))
    loss: dict[str, Any] = {"use_task_rewards": rewards, "distillation_loss_coef": 0.5}
    values = {f"distillation.distillation_loss.{name}": value for name, value in loss.items()}
    values["distillation.enabled"] = True
    mine = assert_same_step(planned, taught, **MODES[mode], **values)
    assert mine["actor/distillation/loss"] > 1e-2
    assert ("actor/pg_loss" in mine) == rewards

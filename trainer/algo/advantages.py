"""From scores to advantages, by verl's estimators."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_kl_controller
from verl.trainer.ppo.ray_trainer import apply_kl_penalty

from lachesis.trainer.data.batch import TrainingBatch

WITHOUT_GROUPS = ("reinforce_plus_plus",)  # estimators whose baseline is the batch


def compares_within_groups(algorithm: DictConfig) -> bool:
    return algorithm.adv_estimator not in WITHOUT_GROUPS


def without_flat_groups(batch: TrainingBatch, algorithm: DictConfig) -> tuple[TrainingBatch, dict[str, float]]:
    """DAPO's filter, algorithm.filter_groups: leave out groups whose scores are all equal, as they teach nothing.

    Groups of one and groups whose environment sent advantages stay.
    """
    if not algorithm.filter_groups.enable:
        return batch, {}
    flat = {uid for uid in set(batch.uids) if len(set(batch.scores[torch.from_numpy(batch.uids == uid)].tolist())) == 1}
    dropped = torch.tensor([uid in flat for uid in batch.uids]) & (batch.group_sizes > 1) & ~batch.is_given
    groups = len(set(batch.uids[dropped.numpy()]))
    return batch.only(~dropped), {"filtered_groups": float(groups), "filtered_sequences": float(dropped.sum())}


def with_kl_in_reward(
    batch: TrainingBatch, old: Tensor, reference: Tensor, algorithm: DictConfig
) -> tuple[TrainingBatch, dict[str, float]]:
    """verl's algorithm.use_kl_in_reward: take kl_ctrl.kl_coef times the divergence of each trained token off its reward.

    Scores outside the model stay as they are. Log-probs are (N, R), in nats.
    """
    if not algorithm.use_kl_in_reward:
        return batch, {}
    mine = {
        "response_mask": batch.response_mask,
        "token_level_scores": batch.token_level_rewards,
        "old_log_probs": old,
        "ref_log_prob": reference,
    }
    data = DataProto.from_dict({name: value[batch.rows] for name, value in mine.items()})
    data, metrics = apply_kl_penalty(data, get_kl_controller(algorithm.kl_ctrl), algorithm.kl_penalty)
    rewards = batch.token_level_rewards.clone()
    rewards[batch.rows] = data.batch["token_level_rewards"]
    return replace(batch, token_level_rewards=rewards), metrics


def estimate_advantages(batch: TrainingBatch, response_mask: Tensor, algorithm: DictConfig) -> Tensor:
    """float32 (N, R): the environment's where it sent any, else verl's estimator; then the overrides.

    A group of one has no baseline to be compared with: its advantage is 0.
    """
    estimated = ~batch.is_given
    if compares_within_groups(algorithm):
        estimated &= batch.group_sizes > 1
    advantages = batch.advantages_given * response_mask
    if estimated.any():
        estimator = get_adv_estimator_fn(algorithm.adv_estimator)
        arguments: dict[str, Any] = {
            "token_level_rewards": batch.token_level_rewards[estimated],
            "response_mask": response_mask[estimated],
            "index": batch.uids[estimated.numpy()],
            "config": algorithm,
        }
        if "norm_adv_by_std_in_grpo" in inspect.signature(estimator).parameters:
            arguments["norm_adv_by_std_in_grpo"] = algorithm.norm_adv_by_std_in_grpo
        advantages[estimated] = estimator(**arguments)[0]
    advantages[batch.set_to_zero] = 0.0
    return advantages

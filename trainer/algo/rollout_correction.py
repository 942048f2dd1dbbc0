"""Off-policy correction: the policy that sampled the tokens is not the one that is trained."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

from lachesis.trainer.data.batch import TrainingBatch


def correct(
    batch: TrainingBatch, old: Tensor, rollout_correction: DictConfig
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Correct for the sampler's policy not being the old one, by verl's rollout correction (importance weights, rejection).

    Returns the response mask after rejection and the weights or None, each (N, R), and verl's rollout_corr/* metrics.
    In bypass mode the loss does it itself.
    """
    if rollout_correction.bypass_mode or not batch.rollout_known.any():
        return batch.response_mask, None, {}
    # a token whose sampler's log-prob is unknown counts as on-policy: ratio 1
    rollout = torch.where(batch.rollout_known, batch.rollout_log_probs, old)
    mine = {"old_log_probs": old, "rollout_log_probs": rollout, "response_mask": batch.response_mask}
    data = DataProto.from_dict({key: value[batch.rows] for key, value in mine.items()})
    data, metrics = compute_rollout_correction_and_add_to_batch(data, rollout_correction)

    def everyone(part: Tensor) -> Tensor:
        full = part.new_zeros(batch.response_mask.shape)
        full[batch.rows] = part
        return full

    weights = data.batch.get("rollout_is_weights")
    return everyone(data.batch["response_mask"]), None if weights is None else everyone(weights), metrics

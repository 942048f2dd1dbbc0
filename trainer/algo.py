"""One policy-gradient step, from verl's parts: log-probs, off-policy correction, advantages, loss, optimizer."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.utils.padding import response_from_nested

from lachesis.trainer.engine import Engine
from lachesis.trainer.mapping import TrainingBatch

WITHOUT_GROUPS = ("reinforce_plus_plus",)  # estimators whose baseline is the batch


@dataclass(frozen=True)
class Estimated:
    """What a step trained on: the batch as it was after filtering, and its tokens' advantages."""

    batch: TrainingBatch
    response_mask: Tensor  # int64 (N, R), after rejection
    advantages: Tensor  # float32 (N, R)


class Learner:
    """Trains one policy, batch by batch."""

    estimated: Estimated | None = None  # of the newest step, if it trained anything

    def __init__(self, engine: Engine, algorithm: DictConfig) -> None:
        self._worker, self._actor = engine.worker, engine.actor
        self._algorithm = algorithm
        self._pad_small_steps = engine.pad_small_steps

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """Update the weights once. Returns this step's metrics; seconds under logp_s and train_s.

        A batch without a trained token changes nothing and has a loss of 0.
        """
        self.estimated = None
        if len(batch.rows) == 0:
            return {"loss": 0.0, "grad_norm": 0.0, "logp_s": 0.0, "train_s": 0.0}
        started = time.perf_counter()
        old_log_probs, metrics = self._old_log_probs(batch)
        after_log_probs = time.perf_counter()
        response_mask, weights, correction = correct(batch, old_log_probs, self._algorithm.rollout_correction)
        advantages = estimate_advantages(batch, response_mask, self._algorithm)
        self.estimated = Estimated(batch, response_mask, advantages)
        metrics |= correction | self._update(batch, old_log_probs, response_mask, advantages, weights)
        return metrics | {"logp_s": after_log_probs - started, "train_s": time.perf_counter() - after_log_probs}

    def log_probs(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (nats) and entropies of the present weights, each float32 (N, R)."""
        data = batch.model.select("input_ids", "position_ids", "loss_mask")
        self._annotate(data, batch, calculate_entropy=True, compute_loss=False)
        out, mask = self._worker.infer_batch(data), batch.model["response_mask"]
        log_probs, entropy = (response_from_nested(tu.get(out, key), mask) for key in ("log_probs", "entropy"))
        return batch.padded(log_probs), batch.padded(entropy)

    def _old_log_probs(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """Of the policy before the update: the engine's own; in bypass mode the sampler's wherever it is known."""
        trained = batch.response_mask.bool()
        bypass = self._algorithm.rollout_correction.bypass_mode
        if bypass and torch.equal(batch.rollout_known, trained):
            return batch.rollout_log_probs, {}
        log_probs, entropy = self.log_probs(batch)
        metrics = {"entropy": entropy[trained].mean().item()}
        if batch.rollout_known.any():
            gap = (log_probs - batch.rollout_log_probs)[batch.rollout_known].abs()
            metrics |= {"logp_gap_mean": gap.mean().item(), "logp_gap_max": gap.max().item()}
        if bypass:
            log_probs = torch.where(batch.rollout_known, batch.rollout_log_probs, log_probs)
        return log_probs, metrics

    def _update(
        self, batch: TrainingBatch, old: Tensor, response_mask: Tensor, advantages: Tensor, weights: Tensor | None
    ) -> dict[str, float]:
        data = batch.model.copy()
        data["old_log_probs"] = batch.jagged(old)
        data["advantages"] = batch.jagged(advantages)
        data["response_mask"] = data["loss_mask"] = batch.jagged(response_mask)
        if weights is not None:
            data["rollout_is_weights"] = batch.jagged(weights)
        entropy = self._actor.calculate_entropy or self._actor.entropy_coeff != 0
        self._annotate(data, batch, calculate_entropy=entropy, global_batch_size=len(batch.rows))
        self._worker.optimizer_zero_grad()
        found = _across_ranks(tu.get(self._worker.forward_backward(data), "metrics"))
        grad_norm = self._worker.optimizer_step()["grad_norm"]
        learning_rate = self._worker.engine.optimizer.param_groups[0]["lr"]
        self._worker.engine.lr_scheduler_step()
        return {
            "loss": float(found["loss"]),
            "grad_norm": float(grad_norm),
            "clip_frac": float(found.get("actor/pg_clipfrac", 0.0)),
            "kl": float(found.get("actor/ppo_kl", 0.0)),
            "lr": float(learning_rate),
        }

    def _annotate(self, data: TensorDict, batch: TrainingBatch, **values: Any) -> None:
        """Add what verl's engine reads beside the tensors: temperature, `values`, and how to cut micro-batches.

        verl packs micro-batches of a token budget. Without a flash kernel, attention over a pack costs the square of
        its length, so a step that fits one micro-batch as a padded rectangle is computed as that: short sequences
        take half the time, and the values are the same to rounding.
        """
        lengths = batch.model["input_ids"].offsets().diff()
        if self._pad_small_steps and len(lengths) * int(lengths.max()) <= self._actor.ppo_max_token_len_per_gpu:
            values |= {"use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": len(lengths)}
        tu.assign_non_tensor(data, **values)
        if isinstance(batch.temperature, Tensor):
            data["temperature"] = batch.temperature
        else:
            tu.assign_non_tensor(data, temperature=batch.temperature)


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


def estimate_advantages(batch: TrainingBatch, response_mask: Tensor, algorithm: DictConfig) -> Tensor:
    """float32 (N, R): the environment's where it sent any, else verl's estimator; then the overrides.

    A group of one has no baseline to be compared with: its advantage is 0.
    """
    estimated = ~batch.is_given
    if algorithm.adv_estimator not in WITHOUT_GROUPS:
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


def _across_ranks(gathered: dict[str, Any]) -> dict[str, float]:
    """verl gathers its own metrics as one `Metric` per data-parallel rank and reduces the rest itself."""
    return {
        name: Metric.aggregate_dp(value) if isinstance(value, list) and isinstance(value[0], Metric) else value
        for name, value in gathered.items()
    }

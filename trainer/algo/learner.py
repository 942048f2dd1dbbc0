"""One policy-gradient step, from verl's parts: log-probs, off-policy correction, advantages, loss, optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.utils.metric import Metric, reduce_metrics
from verl.workers.utils.padding import response_from_nested

from lachesis.trainer.algo.advantages import (
    compares_within_groups,
    estimate_advantages,
    with_kl_in_reward,
    without_flat_groups,
)
from lachesis.trainer.algo.rollout_correction import correct
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.engine.distributed import share
from lachesis.trainer.engine.verl_engine import Engine


@dataclass(frozen=True)
class Estimated:
    """What a step trained on: the batch as it was after filtering, and its tokens' advantages."""

    batch: TrainingBatch
    response_mask: Tensor  # int64 (N, R), after rejection
    advantages: Tensor  # float32 (N, R)


class Learner:
    """Trains one policy, batch by batch."""

    estimated: Estimated | None = None  # of the newest batch, if it trained anything
    entered = 0  # how many of its sequences entered the model
    _train_s = 0.0  # of the newest forward_backward

    def __init__(self, engine: Engine, algorithm: DictConfig) -> None:
        self._worker, self._actor, self._reference = engine.worker, engine.actor, engine.reference
        self._ranks = engine.ranks
        self._algorithm = algorithm
        self._pad_small_steps = engine.pad_small_steps
        self.compares, self.distills = compares_within_groups(algorithm), engine.distillation is not None
        self._update_flags = {}
        if engine.distillation:
            only = not engine.distillation.use_task_rewards
            self._update_flags = {"distillation_use_topk": True, "distillation_only": only}

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """Update the weights once. Returns this step's metrics: verl's under verl's names; seconds as logp_s, train_s.

        Where nothing is left to train (no trained token, or all filtered or rejected) the weights stay, the loss is 0,
        and the learning rate's schedule goes on.
        """
        return self.forward_backward(batch) | self.optimizer_step()

    def forward_backward(self, batch: TrainingBatch) -> dict[str, float]:
        """The first half of `step`: the gradients of this batch's loss, and no others. Returns its metrics."""
        self._worker.optimizer_zero_grad()
        metrics = self.accumulate(batch)
        self._train_s = metrics["train_s"]
        return metrics

    def optimizer_step(self) -> dict[str, float]:
        """The second half of `step`. Returns its metrics, with train_s of both."""
        began = time.perf_counter()
        metrics = self.update(any_gradient=self.estimated is not None)
        return metrics | {"train_s": self._train_s + time.perf_counter() - began}

    def accumulate(self, batch: TrainingBatch, *, sequences: int | None = None) -> dict[str, float]:
        """Add the gradients of the batch's loss to those there are. Returns metrics as `step` does.

        `sequences`: what verl's means over sequences divide by; None: how many of the batch enter the model.
        """
        self.estimated = None
        started = time.perf_counter()
        batch, metrics = without_flat_groups(batch, self._algorithm)
        self.entered = len(batch.rows)
        logp_s, found = 0.0, {"loss": 0.0}
        if self.entered:
            old_log_probs, told = self._old_log_probs(batch)
            logp_s = time.perf_counter() - started
            extra: dict[str, Tensor] = {"old_log_probs": old_log_probs}
            if self._reference:
                extra["ref_log_prob"] = reference = self._reference_log_probs(batch)
                batch, penalty = with_kl_in_reward(batch, old_log_probs, reference, self._algorithm)
                metrics |= penalty
            response_mask, weights, corrected = correct(batch, old_log_probs, self._algorithm.rollout_correction)
            metrics |= told | corrected
            if weights is not None:
                extra["rollout_is_weights"] = weights
            if response_mask.any():
                extra["advantages"] = advantages = estimate_advantages(batch, response_mask, self._algorithm)
                self.estimated = Estimated(batch, response_mask, advantages)
                found = self._backward(batch, response_mask, extra, sequences or self.entered)
        took = time.perf_counter() - started
        return metrics | found | {"logp_s": logp_s, "train_s": took - logp_s}

    def update(self, *, any_gradient: bool) -> dict[str, float]:
        """Make one optimizer step of the gradients there are, unless there are none, and go on in the schedule."""
        learning_rate, grad_norm = float(self._worker.engine.optimizer.param_groups[0]["lr"]), 0.0
        if any_gradient:
            grad_norm = float(self._worker.optimizer_step().get("grad_norm", 0.0))
        self._worker.engine.lr_scheduler_step()
        return {"lr": learning_rate, "grad_norm": grad_norm}

    def log_probs(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (nats) and entropies of the present weights, each float32 (N, R)."""
        log_probs, entropy = self._inferred(batch, self._worker, self._worker.infer_batch, "log_probs", "entropy")
        return log_probs, entropy

    def _reference_log_probs(self, batch: TrainingBatch) -> Tensor:
        """float32 (N, R): as the environment sent them, else the reference's own."""
        assert self._reference is not None
        missing = (batch.response_mask.bool() & ~batch.ref_known).any(dim=1)
        if not missing.any():
            return batch.ref_log_probs
        computed = torch.zeros_like(batch.ref_log_probs)
        [computed[missing]] = self._inferred(
            batch.only(missing), self._reference.worker, self._reference.infer, "log_probs"
        )
        return torch.where(batch.ref_known, batch.ref_log_probs, computed)

    def _inferred(self, batch: TrainingBatch, worker: Any, infer: Callable[[TensorDict], Any], *names: str) -> Tensor:
        """What a forward pass says of every trained token, float32 (names, N, R), the same on every rank."""
        mine = self._share(batch)
        data = mine.model.select("input_ids", "position_ids", "loss_mask")
        self._annotate(data, batch, mine, worker, calculate_entropy="entropy" in names, compute_loss=False)
        out, mask = infer(data), mine.model["response_mask"]
        found = torch.zeros(len(names), *batch.response_mask.shape)
        if out is not None:  # else another rank of this one's sequence-parallel group has it
            for place, name in enumerate(names):
                found[place] = mine.padded(response_from_nested(tu.get(out, name), mask))
        return self._ranks.sum(found)

    def _share(self, batch: TrainingBatch) -> TrainingBatch:
        """This rank's rows. All have as many: verl makes the ranks' numbers of micro-batches equal, and each needs a row."""
        engine = self._worker.engine
        ranks, lengths = engine.get_data_parallel_size(), batch.model["input_ids"].offsets().diff().tolist()
        if ranks == 1:
            return batch
        shares = share(lengths, ranks)
        mine = shares[engine.get_data_parallel_rank()]
        return batch.part(mine, filler=max(map(len, shares)) - len(mine))

    def _old_log_probs(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """Of the policy before the update: the engine's own; in bypass mode the sampler's wherever it is known."""
        trained, known = batch.response_mask.bool(), batch.rollout_known
        bypass = self._algorithm.rollout_correction.bypass_mode
        if bypass and torch.equal(known, trained):
            return batch.rollout_log_probs, {}
        log_probs, entropy = self.log_probs(batch)
        mean = agg_loss(entropy, trained, self._actor.loss_agg_mode, loss_scale_factor=self._actor.loss_scale_factor)
        metrics = {"entropy": entropy[trained].mean().item(), "actor/entropy": mean.item()}
        if known.any():
            metrics |= _sampler_gap(log_probs, batch.rollout_log_probs, known)
        return torch.where(known, batch.rollout_log_probs, log_probs) if bypass else log_probs, metrics

    def _backward(
        self, batch: TrainingBatch, response_mask: Tensor, extra: dict[str, Tensor], sequences: int
    ) -> dict[str, float]:
        """One pass of verl's loss, forth and back. `extra`: what the loss reads besides, each (N, R)."""
        mine = self._share(batch)
        data = mine.model.copy()
        for name, value in extra.items():
            data[name] = mine.jagged(value)
        data["response_mask"] = data["loss_mask"] = mine.jagged(response_mask)
        entropy = self._actor.calculate_entropy or self._actor.entropy_coeff != 0
        flags = self._update_flags | {"calculate_entropy": entropy, "global_batch_size": sequences}
        self._annotate(data, batch, mine, self._worker, **flags)
        out = self._worker.forward_backward(data)
        found = {"loss": 0.0} if out is None else _reduced(tu.get(out, "metrics"))
        return found | {"clip_frac": found.get("actor/pg_clipfrac", 0.0), "kl": found.get("actor/ppo_kl", 0.0)}

    def _annotate(
        self, data: TensorDict, batch: TrainingBatch, mine: TrainingBatch, worker: Any, **values: Any
    ) -> None:
        """Add what verl's engine reads beside the tensors of `mine`: temperature, `values`, how to cut micro-batches.

        verl packs micro-batches of a token budget. Without a flash kernel, attention over a pack costs the square of
        its length, so a step that fits one micro-batch as a padded rectangle is computed as that: short sequences
        take half the time, and the values are the same to rounding. Micro-batches of a fixed size must divide the
        rows, of which some may have been left out: then they get smaller.
        """
        longest = int(batch.model["input_ids"].offsets().diff().max())  # of all ranks: they must decide alike
        count, budget = len(data), self._actor.ppo_max_token_len_per_gpu
        if self._pad_small_steps and count * longest <= budget:
            values |= {"use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": count}
        elif not worker.engine_config.use_dynamic_bsz:
            size = min(count, worker.engine_config.infer_micro_batch_size_per_gpu)
            values["micro_batch_size_per_gpu"] = next(n for n in range(size, 0, -1) if count % n == 0)
        tu.assign_non_tensor(data, **values)
        if isinstance(mine.temperature, Tensor):
            data["temperature"] = mine.temperature
        else:
            tu.assign_non_tensor(data, temperature=mine.temperature)


def _sampler_gap(log_probs: Tensor, rollout: Tensor, known: Tensor) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's; verl's training/* are of probabilities."""
    gap = (log_probs - rollout)[known].abs()
    tensors = {"old_log_probs": log_probs, "rollout_log_probs": rollout, "response_mask": known, "responses": known}
    theirs = calculate_debug_metrics(DataProto.from_dict(tensors))
    # a deviation or correlation of one token, or of equal ones, is not a number
    finite = {name: float(value) for name, value in theirs.items() if math.isfinite(value)}
    return {"logp_gap_mean": gap.mean().item(), "logp_gap_max": gap.max().item()} | finite


def _reduced(gathered: dict[str, Any]) -> dict[str, float]:
    """verl's metrics, one value each, as its own driver reduces them: over ranks, then over micro-batches."""
    found = {}
    for name, value in gathered.items():
        if isinstance(value, list):
            by_metric = isinstance(value[0], Metric)
            value = Metric.aggregate_dp(value) if by_metric else [one for rank in value for one in rank]
        if not name.startswith("perf/"):
            prefixed = name == "loss" or name.startswith(("actor/", "rollout_corr/"))
            found[name if prefixed else f"actor/{name}"] = value
    return {name: float(value) for name, value in reduce_metrics(found).items()}

"""One step the way verl's own driver makes it (RayPPOTrainer.fit): padded tensors, its conversions, its calls, its order."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lachesis.broker.records.groups import Group


def padded_batch(groups: list[Group]) -> tuple[dict[str, Tensor], np.ndarray]:
    """Prompts padded on the left, responses on the right; the first trained token begins the response."""
    rows = [
        (tokens, mask, log_probs, score, group.gid)
        for group in groups
        for tokens, mask, log_probs, score in zip(
            group.tokens, group.masks, group.inference_logprobs or [], group.scores, strict=True
        )
    ]
    starts = [int((mask != -100).argmax()) for _, mask, *_ in rows]
    longest_prompt = max(starts)
    longest_response = max(len(row[0]) - start for row, start in zip(rows, starts, strict=True))
    shape = (len(rows), longest_prompt + longest_response)
    ids, attention = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    mask_, rewards, rollout = (torch.zeros(len(rows), longest_response) for _ in range(3))
    for row, ((tokens, mask, log_probs, score, _), start) in enumerate(zip(rows, starts, strict=True)):
        begin, size = longest_prompt - start, len(tokens)
        ids[row, begin : begin + size] = torch.from_numpy(tokens.astype("<i8"))
        attention[row, begin : begin + size] = 1
        trained = torch.from_numpy(mask[start:] != -100)
        mask_[row, : size - start] = trained.float()
        rollout[row, : size - start] = torch.from_numpy(np.where(trained, log_probs[start:], 0.0))
        rewards[row, int(trained.nonzero()[-1])] = float(score)
    batch = {
        "prompts": ids[:, :longest_prompt],
        "responses": ids[:, longest_prompt:],
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "response_mask": mask_.long(),
        "token_level_scores": rewards,
        "rollout_log_probs": rollout,
    }
    if groups[0].rest.get("distill_token_ids"):
        batch |= teacher_tensors(groups, attention)
    return batch, np.array([row[-1] for row in rows], dtype=object)


def teacher_tensors(groups: list[Group], attention: Tensor) -> dict[str, Tensor]:
    """(rows, length, K), each at the token whose logits it is compared with: the one before the teacher's."""
    ids = [row for group in groups for row in group.rest["distill_token_ids"]]
    log_probs = [row for group in groups for row in group.rest["distill_logprobs"]]
    width = len(ids[0][-1])
    found = {
        "teacher_ids": torch.zeros((*attention.shape, width), dtype=torch.int64),
        "teacher_logprobs": torch.full((*attention.shape, width), -1e4),
    }
    for row, places in enumerate(attention):
        begin = int(places.argmax())
        for place in range(1, len(ids[row])):
            if ids[row][place]:
                found["teacher_ids"][row, begin + place - 1] = torch.tensor(ids[row][place])
                found["teacher_logprobs"][row, begin + place - 1] = torch.tensor(log_probs[row][place])
    return found


class Driver:
    """verl's driver around one worker, and a reference worker where the configuration needs one.

    `config` is the whole configuration, as verl's trainer has it.
    """

    def __init__(self, worker: Any, config: Any) -> None:
        from verl.trainer.ppo.core_algos import get_kl_controller
        from verl.trainer.ppo.utils import need_reference_policy
        from verl.workers.engine_workers import ActorRolloutRefWorker

        self._worker, self._config = worker, config
        self._kl_ctrl = get_kl_controller(config.algorithm.kl_ctrl)
        self._no_adapter = config.actor_rollout_ref.model.lora_rank > 0  # verl's ref_in_actor
        self._reference = worker
        if need_reference_policy(config) and not self._no_adapter:
            outer = ActorRolloutRefWorker(copy.deepcopy(config.actor_rollout_ref), role="ref")
            outer.init_model()
            self._reference = outer.ref

    def step(self, groups: list[Group]) -> dict[str, float]:
        """Train on the groups; verl's metrics, under the names its driver gives them."""
        from verl import DataProto
        from verl.trainer.distillation.losses import distillation_ppo_loss
        from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
        from verl.trainer.ppo.rollout_corr_helper import (
            apply_bypass_mode,
            compute_rollout_correction_and_add_to_batch,
        )
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.config import DistillationConfig
        from verl.workers.utils.losses import ppo_loss

        algorithm, actor = self._config.algorithm, self._config.actor_rollout_ref.actor
        correction = algorithm.rollout_correction
        metrics: dict[str, Any] = {}
        tensors, uids = padded_batch(groups)
        batch = DataProto.from_dict(tensors, non_tensors={"uid": uids})
        if correction.bypass_mode and actor.policy_loss.loss_mode in ("vanilla", "bypass_mode"):
            apply_bypass_mode(batch, correction, actor.policy_loss)
        elif correction.bypass_mode:  # as verl's V1 trainer does: the loss stays
            batch.batch["old_log_probs"] = batch.batch["rollout_log_probs"]
        else:
            metrics |= self._old_log_probs(batch)
        if actor.use_kl_loss or algorithm.use_kl_in_reward:
            batch.batch["ref_log_prob"] = self._log_probs(self._reference, batch, no_lora_adapter=self._no_adapter)[0]
        if algorithm.use_kl_in_reward:
            batch, found = apply_kl_penalty(batch, self._kl_ctrl, algorithm.kl_penalty)
            metrics |= found
        else:
            batch.batch["token_level_rewards"] = batch.batch["token_level_scores"]
        if not correction.bypass_mode:
            batch, found = compute_rollout_correction_and_add_to_batch(batch, correction)
            metrics |= found
        batch = compute_advantage(
            batch,
            adv_estimator=algorithm.adv_estimator,
            gamma=algorithm.gamma,
            lam=algorithm.lam,
            norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
            config=algorithm,
        )
        loss = partial(ppo_loss, config=omega_conf_to_dataclass(actor))
        if self._config.distillation.enabled:
            settings = omega_conf_to_dataclass(self._config.distillation.distillation_loss)
            distillation = DistillationConfig(distillation_loss=settings)
            loss = partial(
                distillation_ppo_loss, config=omega_conf_to_dataclass(actor), distillation_config=distillation
            )
        self._worker.set_loss_fn(loss)
        metrics |= self._update(batch, actor)
        return {name: float(value) for name, value in metrics.items()}

    def _old_log_probs(self, batch: Any) -> dict[str, float]:
        from verl.trainer.ppo.core_algos import agg_loss
        from verl.utils.debug.metrics import calculate_debug_metrics

        actor = self._config.actor_rollout_ref.actor
        batch.batch["old_log_probs"], entropy = self._log_probs(self._worker, batch)
        mean = agg_loss(
            loss_mat=entropy,
            loss_mask=batch.batch["response_mask"],
            loss_agg_mode=actor.loss_agg_mode,
            loss_scale_factor=actor.loss_scale_factor,
        )
        return {"actor/entropy": mean.item(), **calculate_debug_metrics(batch)}

    def _log_probs(self, worker: Any, batch: Any, **more: Any) -> tuple[Tensor, Tensor]:
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

        data = left_right_2_no_padding(batch.to_tensordict())
        temperature = self._config.actor_rollout_ref.rollout.temperature
        tu.assign_non_tensor(data, temperature=temperature, calculate_entropy=True, compute_loss=False, **more)
        out = worker.infer_batch(data)
        log_probs, entropy = (no_padding_2_padding(tu.get(out, name), data) for name in ("log_probs", "entropy"))
        return log_probs.float(), entropy.float()

    def _update(self, batch: Any, actor: Any) -> dict[str, float]:
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import reduce_metrics
        from verl.utils.py_functional import rename_dict
        from verl.workers.utils.padding import left_right_2_no_padding

        data = left_right_2_no_padding(batch.to_tensordict())
        distillation = self._config.distillation
        tu.assign_non_tensor(
            data,
            distillation_use_topk=distillation.enabled,
            distillation_only=distillation.enabled and not distillation.distillation_loss.use_task_rewards,
            temperature=self._config.actor_rollout_ref.rollout.temperature,
            calculate_entropy=actor.calculate_entropy or actor.entropy_coeff != 0.0,
            global_batch_size=len(batch),
            mini_batch_size=len(batch),
            epochs=1,
            seed=1,
            dataloader_kwargs={"shuffle": False},
            compute_loss=True,
        )
        found = dict(tu.get(self._worker.train_mini_batch(data), "metrics"))
        return reduce_metrics(rename_dict(found, "actor/"))

"""One GRPO step the way verl's own driver does it (RayPPOTrainer): padded tensors, its conversions, its calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lachesis.broker.records import Group


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
        "token_level_rewards": rewards,
        "rollout_log_probs": rollout,
    }
    return batch, np.array([row[-1] for row in rows], dtype=object)


def grpo_step(worker: Any, groups: list[Group], rollout_correction: Any) -> dict[str, float]:
    from verl import DataProto
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import reduce_metrics
    from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

    tensors, uids = padded_batch(groups)
    data = DataProto.from_dict(tensors)
    jagged = left_right_2_no_padding(data.to_tensordict())
    tu.assign_non_tensor(jagged, temperature=1.0, calculate_entropy=True, compute_loss=False)
    data.batch["old_log_probs"] = no_padding_2_padding(tu.get(worker.infer_batch(jagged), "log_probs"), jagged)
    data, _ = compute_rollout_correction_and_add_to_batch(data, rollout_correction)
    data.batch["advantages"], _ = compute_grpo_outcome_advantage(
        data.batch["token_level_rewards"], data.batch["response_mask"], uids
    )
    jagged = left_right_2_no_padding(data.to_tensordict())
    tu.assign_non_tensor(
        jagged,
        temperature=1.0,
        calculate_entropy=False,
        global_batch_size=len(uids),
        mini_batch_size=len(uids),
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
    )
    return {k: float(v) for k, v in reduce_metrics(dict(tu.get(worker.train_mini_batch(jagged), "metrics"))).items()}

"""Groups, as environments post them, to the tensors of one optimizer step. Pure: no verl, no Redis, no randomness.

A sequence's *response* starts at its first trained token and runs to its end. Tool and user tokens inside it are part
of the response but not of `response_mask`, so they are context and never a target. Environments' token-level arrays are
aligned with the tokens they belong to, and so are verl's response-aligned ones: nothing is shifted. Nothing is
truncated either: a sequence enters the model whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lachesis.broker.records import Group
from lachesis.trainer.batch import TrainingBatch

__all__ = ["TrainingBatch", "to_batch"]

NOT_TRAINED = -100


def to_batch(groups: Sequence[Group], *, vocab_size: int, max_tokens: int, temperature: float = 1.0) -> TrainingBatch:
    """Map the groups of one step.

    Args:
        vocab_size: token ids must be below this.
        max_tokens: the longest sequence, in tokens, that the model and one micro-batch can hold.
        temperature: of sampling, where neither the sequence nor its group says.
    """
    count = sum(len(group.tokens) for group in groups)
    rows: list[int] = []
    starts: list[int] = []
    tokens: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    temperatures: list[float] = []
    unfit = 0
    row = 0
    for group in groups:
        for index, (ids, mask) in enumerate(zip(group.tokens, group.masks, strict=True)):
            where = np.flatnonzero(mask != NOT_TRAINED)
            where = where[where > 0]  # nothing comes before token 0, so it has no log-prob
            if len(ids) > max_tokens or int(ids.max()) >= vocab_size:
                unfit += 1
            elif len(where):
                start = int(where[0])
                rows.append(row)
                starts.append(start)
                tokens.append(ids)
                trained.append(mask[start:] != NOT_TRAINED)
                temperatures.append(_temperature(group.rest, index, temperature))
            row += 1

    width = max((len(mask) for mask in trained), default=1)
    response_mask = np.zeros((count, width), dtype=np.int64)
    for row, mask in zip(rows, trained, strict=True):
        response_mask[row, : len(mask)] = mask
    scores = np.concatenate([group.scores for group in groups])
    rewards = np.zeros((count, width), dtype=np.float32)
    last = width - 1 - response_mask[:, ::-1].argmax(axis=1)
    rewards[np.arange(count), np.where(response_mask.any(axis=1), last, 0)] = scores

    start_of = dict(zip(rows, starts, strict=True))
    rollout, rollout_known = _log_probs([group.inference_logprobs for group in groups], groups, start_of, response_mask)
    ref, ref_known = _log_probs([group.ref_logprobs for group in groups], groups, start_of, response_mask)
    advantages, is_given = _aligned([group.advantages for group in groups], groups, start_of, width)

    return TrainingBatch(
        model=_model_rows(tokens, starts, trained),
        rows=torch.tensor(rows, dtype=torch.int64),
        response_mask=torch.from_numpy(response_mask),
        token_level_rewards=torch.from_numpy(rewards),
        rollout_log_probs=rollout,
        rollout_known=rollout_known,
        ref_log_probs=ref,
        ref_known=ref_known,
        advantages_given=torch.from_numpy(advantages * response_mask.astype(np.float32)),
        is_given=torch.from_numpy(is_given),
        set_to_zero=torch.tensor(
            [_zeroed(group.rest, index) for group in groups for index in range(len(group.tokens))]
        ),
        uids=np.array([group.gid for group in groups for _ in group.tokens], dtype=object),
        group_sizes=torch.tensor([len(group.tokens) for group in groups for _ in group.tokens]),
        scores=torch.from_numpy(scores),
        temperature=temperatures[0] if len(set(temperatures)) == 1 else torch.tensor(temperatures, dtype=torch.float32),
        tokens=sum(len(ids) for group in groups for ids in group.tokens),
        unfit=unfit,
    )


def _model_rows(tokens: list[np.ndarray], starts: list[int], trained: list[np.ndarray]) -> TensorDict:
    def jagged(parts: list[np.ndarray]) -> Tensor:
        offsets = np.cumsum([0, *map(len, parts)])
        values = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
        return torch.nested.nested_tensor_from_jagged(torch.from_numpy(values), torch.from_numpy(offsets))

    response_mask = jagged(trained)
    columns = {
        "input_ids": jagged(tokens),
        "position_ids": jagged([np.arange(len(ids)) for ids in tokens]),
        "prompts": jagged([ids[:start] for ids, start in zip(tokens, starts, strict=True)]),
        "responses": jagged([ids[start:] for ids, start in zip(tokens, starts, strict=True)]),
        "response_mask": response_mask,
        "loss_mask": response_mask,
    }
    return TensorDict(columns, batch_size=[len(tokens)])


def _log_probs(
    fields: Sequence[list[np.ndarray] | None], groups: Sequence[Group], start_of: dict[int, int], mask: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of trained tokens, float32 (N, R), 0 where unknown; and where they are known, bool (N, R)."""
    values, has = _aligned(fields, groups, start_of, mask.shape[1])
    # environments write 1.0 for "none here"; no log-probability is above 0
    known = mask.astype(bool) & has[:, None] & (values <= 0)
    return torch.from_numpy(np.where(known, values, np.float32(0))), torch.from_numpy(known)


def _aligned(
    fields: Sequence[list[np.ndarray] | None], groups: Sequence[Group], start_of: dict[int, int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """A token-level field cut to the responses, float32 (N, R), and which sequences' groups have it, bool (N,)."""
    count = sum(len(group.tokens) for group in groups)
    values, has = np.zeros((count, width), dtype=np.float32), np.zeros(count, dtype=bool)
    row = 0
    for field, group in zip(fields, groups, strict=True):
        for index in range(len(group.tokens)):
            if field:  # some environments send an empty list for "none"
                has[row] = True
                if row in start_of:
                    response = field[index][start_of[row] :]
                    values[row, : len(response)] = response
            row += 1
    return values, has


def _override(rest: dict[str, Any], index: int) -> dict[str, Any]:
    overrides = rest.get("overrides") or []
    return (overrides[index] or {}) if index < len(overrides) else {}


def _zeroed(rest: dict[str, Any], index: int) -> bool:
    return bool(_override(rest, index).get("set_advantage_to_zero"))


def _temperature(rest: dict[str, Any], index: int, default: float) -> float:
    """The nearest that says: sequence, generation parameters, group; what can't be sampled at (0, text) doesn't count."""
    for source in (_override(rest, index), rest.get("generation_params") or {}, rest.get("group_overrides") or {}):
        value = source.get("temperature")
        if isinstance(value, int | float) and 0 < value < math.inf:
            return float(value)
    return default

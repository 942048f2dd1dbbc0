"""Groups, as environments post them, to the tensors of one optimizer step. Pure: no verl, no Redis, no randomness.

A sequence's *response* starts at its first trained token and runs to its end. Tool and user tokens inside it are part
of the response but not of `response_mask`, so they are context and never a target. Environments' token-level arrays are
aligned with the tokens they belong to, and so are verl's response-aligned ones: nothing is shifted. Nothing is
truncated either: a sequence enters the model whole or not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lachesis.broker.records.groups import Group
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.data.distillation import teacher_columns
from lachesis.trainer.data.validate import NOT_TRAINED, Limits, Untrainable, check_score, check_sequence, targets


def to_batch(
    groups: Sequence[Group],
    *,
    vocab_size: int,
    max_tokens: int,
    temperature: float = 1.0,
    compares: bool = True,
    distills: bool = False,
) -> TrainingBatch:
    """Map the groups of one step.

    Args:
        vocab_size: token ids must be below this.
        max_tokens: the longest sequence, in tokens, that the model and one micro-batch can hold.
        temperature: of sampling, where neither the sequence nor its group says.
        compares: whether the advantage estimator compares the sequences of a group; then a group of one, unless its
            environment sent advantages, teaches nothing.
        distills: whether the loss has a term for a teacher's tokens; then the model's rows have them.
    """
    limits = Limits(vocab_size, max_tokens, compares, distills)
    sequences, untrainable = _scored(groups)
    scored = Counter(id(group) for group, _ in sequences)
    rows: list[int] = []
    starts: list[int] = []
    for row, (group, index) in enumerate(sequences):
        reason = check_sequence(group, index, limits, scored=scored[id(group)])
        if reason:
            untrainable.append(reason)
        else:
            rows.append(row)
            starts.append(int(targets(group, index)[0]))
    tokens = [sequences[row][0].tokens[sequences[row][1]] for row in rows]
    trained = [
        sequences[row][0].masks[sequences[row][1]][start:] != NOT_TRAINED
        for row, start in zip(rows, starts, strict=True)
    ]
    temperatures = [_temperature(sequences[row][0].rest, sequences[row][1], temperature) for row in rows]

    count, width = len(sequences), max((len(mask) for mask in trained), default=1)
    response_mask = np.zeros((count, width), dtype=np.int64)
    for row, mask in zip(rows, trained, strict=True):
        response_mask[row, : len(mask)] = mask
    scores = np.array([group.scores[index] for group, index in sequences], dtype=np.float64)
    rewards = np.zeros((count, width), dtype=np.float32)
    last = width - 1 - response_mask[:, ::-1].argmax(axis=1)
    rewards[np.arange(count), np.where(response_mask.any(axis=1), last, 0)] = scores

    model = _model_rows(tokens, starts, trained)
    if distills:
        model.update(teacher_columns([sequences[row] for row in rows]))
    placed = [(row, start, *sequences[row]) for row, start in zip(rows, starts, strict=True)]
    rollout, rollout_known = _log_probs(("inference_logprobs", "sampled_logprobs"), placed, response_mask)
    ref, ref_known = _log_probs(("ref_logprobs",), placed, response_mask)
    return TrainingBatch(
        model=model,
        rows=torch.tensor(rows, dtype=torch.int64),
        response_mask=torch.from_numpy(response_mask),
        token_level_rewards=torch.from_numpy(rewards),
        rollout_log_probs=rollout,
        rollout_known=rollout_known,
        ref_log_probs=ref,
        ref_known=ref_known,
        advantages_given=torch.from_numpy(_aligned(("advantages",), placed, response_mask)[0] * response_mask).float(),
        is_given=torch.tensor([bool(group.advantages) for group, _ in sequences], dtype=torch.bool),
        set_to_zero=torch.tensor([_zeroed(group.rest, index) for group, index in sequences], dtype=torch.bool),
        uids=np.array([group.gid for group, _ in sequences], dtype=object),
        places=torch.tensor([index for _, index in sequences], dtype=torch.int64),
        group_sizes=torch.tensor([scored[id(group)] for group, _ in sequences], dtype=torch.int64),
        scores=torch.from_numpy(scores),
        temperature=temperatures[0] if len(set(temperatures)) == 1 else torch.tensor(temperatures, dtype=torch.float32),
        tokens=sum(len(ids) for group in groups for ids in group.tokens),
        untrainable=tuple(untrainable),
    )


def _scored(groups: Sequence[Group]) -> tuple[list[tuple[Group, int]], list[Untrainable]]:
    """The sequences that have a score, in order, and why the others have none."""
    sequences: list[tuple[Group, int]] = []
    untrainable: list[Untrainable] = []
    for group in groups:
        for index in range(len(group.tokens)):
            reason = check_score(group, index)
            if reason:
                untrainable.append(reason)
            else:
                sequences.append((group, index))
    return sequences, untrainable


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


_Placed = Sequence[tuple[int, int, Group, int]]  # row of the batch, start of the response, group, row of the group


def _log_probs(fields: Sequence[str], placed: _Placed, mask: np.ndarray) -> tuple[Tensor, Tensor]:
    """Log-probabilities of trained tokens, float32 (N, R), 0 where unknown; and where they are known, bool (N, R)."""
    values, has = _aligned(fields, placed, mask)
    # environments write 1.0 for "none here"; no log-probability is above 0
    known = mask.astype(bool) & has[:, None] & (values <= 0)
    return torch.from_numpy(np.where(known, values, np.float32(0))), torch.from_numpy(known)


def _aligned(fields: Sequence[str], placed: _Placed, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A token-level field cut to the responses, float32 (N, R), and which of the model's sequences have it, bool (N,).

    Of several fields each group's first that it has.
    """
    values, has = np.zeros(mask.shape, dtype=np.float32), np.zeros(len(mask), dtype=bool)
    for row, start, group, index in placed:
        # some environments send an empty list for "none"
        if given := next(filter(None, (getattr(group, field) for field in fields)), None):
            response = given[index][start:]
            has[row] = True
            values[row, : len(response)] = response
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

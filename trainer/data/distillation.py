"""A teacher's likeliest tokens, as environments send them, in the shape that verl's distillation loss reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lachesis.broker.records.groups import Group

NOBODY = -1e4  # log-probability of what the teacher did not say: its weight in the divergence, exp of this, is 0


def teacher_columns(sequences: Sequence[tuple[Group, int]]) -> dict[str, Tensor]:
    """teacher_ids (int64) and teacher_logprobs (float32, nats), jagged (n, tokens, K); K is the longest list of candidates.

    Environments' lists are aligned with the token whose place the candidates compete for, verl's with the logits that
    predict it, one token before. A log-probability above 0 marks "none here", as everywhere.
    """
    said = [_candidates(group, index) for group, index in sequences]
    width = max((len(pairs) for row in said for pairs in row), default=0) or 1
    lengths = [len(group.tokens[index]) for group, index in sequences]
    ids = np.zeros((sum(lengths), width), dtype=np.int64)
    log_probs = np.full((sum(lengths), width), NOBODY, dtype=np.float32)
    starts = np.cumsum([0, *lengths])
    for start, row in zip(starts, said, strict=False):
        for place, pairs in enumerate(row[1:]):
            for column, (token, log_prob) in enumerate(pairs):
                ids[start + place, column], log_probs[start + place, column] = token, log_prob
    offsets = torch.from_numpy(starts)
    return {
        "teacher_ids": torch.nested.nested_tensor_from_jagged(torch.from_numpy(ids), offsets),
        "teacher_logprobs": torch.nested.nested_tensor_from_jagged(torch.from_numpy(log_probs), offsets),
    }


def _candidates(group: Group, index: int) -> list[list[tuple[int, float]]]:
    """For each token of the sequence the teacher's candidates and their log-probs."""
    ids, log_probs = group.rest.get("distill_token_ids"), group.rest.get("distill_logprobs")
    if not ids or not log_probs:
        return []
    places = zip(ids[index], log_probs[index], strict=True)
    return [[(token, value) for token, value in zip(*place, strict=True) if value <= 0] for place in places]

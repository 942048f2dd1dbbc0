"""A few rollouts of a step in words, for people: what was asked, what was answered, what that was worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lachesis.broker.records.groups import Group

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Estimated
    from lachesis.trainer.data.batch import TrainingBatch

GROUPS = 2  # of a step: those whose scores differ most, the best and the worst sequence of each
SHOWN = 2000  # characters of a prompt and of a response


def examples(
    groups: Sequence[Group], batch: TrainingBatch, estimated: Estimated | None, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The values of each example's entry in the run's metrics; at most 2 × GROUPS, each of a few kilobytes."""
    fit: dict[str, list[int]] = {}
    for row in batch.rows.tolist():
        fit.setdefault(batch.uids[row], []).append(int(batch.places[row]))
    for group in sorted(groups, key=lambda group: -np.ptp(group.scores))[:GROUPS]:
        rows = fit.get(group.gid, [])
        by_score = sorted(rows, key=lambda row: -group.scores[row])
        for row in dict.fromkeys((by_score[0], by_score[-1]) if rows else ()):
            tokens, trained = group.tokens[row], group.masks[row] != -100
            start = max(int(trained.argmax()), 1)
            yield {
                "gid": group.gid,
                "env": "-" if group.env is None else group.env,
                "row": row,
                "score": float(group.scores[row]),
                "advantage": _advantage(group, row, estimated),
                "v_min": group.v_min,
                "v_max": group.v_max,
                "tokens": len(tokens),
                "trained_tokens": int(trained.sum()),
                "prompt": shortened(tokenizer.decode(tokens[:start].tolist())),
                "response": shortened(tokenizer.decode(tokens[start:].tolist())),
            }


def shortened(text: str) -> str:
    """The text, or its two ends and how much there was."""
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} … [{len(text):,} characters] … {text[-half:]}"


def _advantage(group: Group, row: int, estimated: Estimated | None) -> float | str:
    """Mean over the sequence's trained tokens; "-" where none was trained."""
    if estimated is None:
        return "-"
    found = np.flatnonzero((estimated.batch.uids == group.gid) & (estimated.batch.places.numpy() == row))
    if not len(found):  # filtered
        return "-"
    mask = estimated.response_mask[int(found[0])].bool()
    return float(estimated.advantages[int(found[0])][mask].mean()) if mask.any() else "-"

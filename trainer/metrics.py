"""What a step's log says about its data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lachesis.broker.records import Group, LedgerEntry
from lachesis.trainer.mapping import TrainingBatch


def batch_metrics(entry: LedgerEntry, groups: Sequence[Group], batch: TrainingBatch) -> dict[str, float]:
    """Step, reward (mean score of all sequences, nothing filtered), lag in versions, sizes."""
    lags = [entry.v_before - group.v_min for group in groups for _ in group.tokens]
    return {
        "step": entry.step,
        "reward": entry.reward,
        "lag": entry.lag,
        "lag_mean": float(np.mean(lags)),
        "sequences": entry.n,
        "tokens": batch.tokens,
        "trained_tokens": int(batch.response_mask.sum()),
        "zero_variance_groups": sum(len(group.scores) > 1 and np.ptp(group.scores) == 0 for group in groups),
        "unfit_sequences": batch.unfit,
    }

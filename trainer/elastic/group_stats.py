"""What one replica tells the others of a group it has trained, and what that makes of the step as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from lachesis.broker.records.groups import DeadEntry
from lachesis.broker.records.steps import BatchEntry, LedgerEntry
from lachesis.trainer.algo.learner import Estimated, Learner
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.prefetch import letters

# metrics that verl divides as it does the loss; others are means over trained tokens, or what their names say
AS_THE_LOSS = ("loss", "actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/entropy_loss")
COUNTED = ("filtered_groups", "filtered_sequences", "logp_s", "train_s")


class GroupStats(msgspec.Struct, frozen=True, array_like=True):
    """Of one group. Arrays are packed as collate.py makes them: scores float64, advantages float32.

    Of groups that were trained at once, the first has the metrics of all, and the other numbers that go with those.
    """

    divisor: float  # their part of what divides the step's sums: tokens, or sequences; 0: they are not divided
    tokens: int  # to be trained
    kept: int  # of them, after rejection
    metrics: dict[str, float]
    scores: bytes
    letters: tuple[DeadEntry, ...]
    places: tuple[int, ...] | None  # of the sequences that were trained, n; None: there was nothing to train
    response_mask: bytes  # uint8 (n, R), after rejection
    advantages: bytes  # (n, R)


encode = msgspec.msgpack.Encoder().encode
decode: Callable[[bytes], GroupStats] = msgspec.msgpack.Decoder(GroupStats).decode


def summarize_group(
    learner: Learner, batch: TrainingBatch, gids: Sequence[str], metrics: dict[str, float], divide_by: str
) -> list[GroupStats]:
    """`batch` is those groups, which the learner has just accumulated; `divide_by`: tokens | sequences | nothing."""
    found, dead = learner.estimated, letters(batch)
    kept = int(found.response_mask.sum()) if found else 0
    divisors = {"tokens": kept, "sequences": learner.entered, "nothing": 0}
    of_all = float(divisors[divide_by]), int(batch.response_mask.sum()), kept, metrics
    return [
        GroupStats(
            *(of_all if number == 0 else (0.0, 0, 0, {})),
            scores=batch.scores.numpy()[batch.uids == gid].tobytes(),
            letters=tuple(letter for letter in dead if letter.gid.rpartition("/")[0] == gid),
            **_trained(found, gid),
        )
        for number, gid in enumerate(gids)
    ]


def _trained(found: Estimated | None, gid: str) -> dict[str, Any]:
    if found is None or not (mine := found.batch.uids == gid).any():
        return {"places": None, "response_mask": b"", "advantages": b""}
    return {
        "places": tuple(found.batch.places.numpy()[mine].tolist()),
        "response_mask": found.response_mask.numpy()[mine].astype(np.uint8).tobytes(),
        "advantages": found.advantages.numpy()[mine].tobytes(),
    }


def ledger_entry(batch: BatchEntry, version_before: int, told: Sequence[GroupStats], loss: float) -> LedgerEntry:
    """`lag`, `replica` and `seconds` are the caller's to fill in."""
    scores = np.frombuffer(b"".join(one.scores for one in told))
    return LedgerEntry(
        step=batch.step,
        gids=batch.gids,
        n=batch.n,
        tok=batch.tok,
        v_before=version_before,
        v_after=batch.step,
        v_min=batch.v_min,
        lag=0,
        replica="",
        reward=torch.from_numpy(scores.copy()).mean().item() if len(scores) else 0.0,
        loss=loss,
        seconds=0.0,
    )


def merged(told: Sequence[GroupStats]) -> dict[str, float]:
    """The step's metrics. The loss and its terms were summed over what `divisor` counts; the rest are means over tokens."""
    names = {name for one in told for name in one.metrics}
    return {name: _merged(name, [one for one in told if name in one.metrics], told) for name in sorted(names)}


def _merged(name: str, having: Sequence[GroupStats], told: Sequence[GroupStats]) -> float:
    values = np.array([one.metrics[name] for one in having])
    if name in COUNTED:
        return float(values.sum())
    if name in AS_THE_LOSS:
        return float(values.sum() / divisor(told))
    if name.endswith(("max", "min")):
        return float(values.max() if name.endswith("max") else values.min())
    in_loss = name in ("clip_frac", "kl") or (name.startswith("actor/") and name != "actor/entropy")
    weights = np.array([one.kept if in_loss else one.tokens for one in having], dtype=float)
    return float(np.average(values, weights=weights if weights.any() else None))


def divisor(told: Sequence[GroupStats]) -> float:
    """Of the step's sums: as if one trainer had normalised its loss over the whole batch."""
    return sum(one.divisor for one in told) or 1.0


def merge_group_stats(told: Sequence[GroupStats], gids: Sequence[str], batch: TrainingBatch) -> Estimated | None:
    """What the step trained on, as one trainer would have known it. `batch` is mapped from all its groups."""
    rows: list[int] = []
    masks, advantages = torch.zeros_like(batch.response_mask), torch.zeros(batch.response_mask.shape)
    row_of = {key: row for row, key in enumerate(zip(batch.uids, batch.places.tolist(), strict=True))}
    for gid, one in zip(gids, told, strict=True):
        if one.places is None:
            continue
        mine = [row_of[gid, place] for place in one.places]
        mask = _unpacked(one.response_mask, np.uint8, len(mine))
        masks[mine, : mask.shape[1]] = mask.to(torch.int64)
        advantages[mine, : mask.shape[1]] = _unpacked(one.advantages, np.float32, len(mine))
        rows += mine
    kept = torch.zeros(len(batch.uids), dtype=torch.bool)
    kept[rows] = True
    return Estimated(batch.only(kept), masks[kept], advantages[kept]) if rows else None


def _unpacked(raw: bytes, dtype: type, rows: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype).reshape(rows, -1).copy())

"""Which sequences can't be trained, and why: said for each, so that whoever sent it can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lachesis.broker.records import Group

NOT_TRAINED = -100
TOKEN_FIELDS = ("advantages", "inference_logprobs", "ref_logprobs")
NOT_MAPPED = {  # fields whose presence changes what training the group would mean
    "images": "the trainer reads text only",
    "distill_token_ids": "the trainer has no distillation loss",
    "distill_logprobs": "the trainer has no distillation loss",
}


@dataclass(frozen=True)
class Untrainable:
    """A sequence that does not enter the model: the field at fault, its value, and the rule it breaks."""

    gid: str
    row: int  # of the group's sequences
    field: str
    value: Any
    rule: str

    def __str__(self) -> str:
        return f"group {self.gid}, sequence {self.row}: {self.field} = {self.value!r}: {self.rule}"


@dataclass(frozen=True)
class Limits:
    """What the model and the algorithm take."""

    vocab_size: int  # token ids are below this
    max_tokens: int  # longest sequence
    compares: bool  # whether the advantage estimator compares the sequences of a group


def targets(group: Group, index: int) -> np.ndarray:
    """Places of the tokens to train, int64. Nothing comes before token 0, so it has no log-prob."""
    where = np.flatnonzero(group.masks[index] != NOT_TRAINED)
    return where[where > 0]


def check_score(group: Group, index: int) -> Untrainable | None:
    """A sequence without a score is left out as if it had never been posted: its group can't be compared with it."""
    if len(group.scores) != len(group.tokens):
        rule = f"must have one per sequence, {len(group.tokens)}"
        return Untrainable(group.gid, index, "scores", f"{len(group.scores)} values", rule)
    score = float(group.scores[index])
    return None if np.isfinite(score) else Untrainable(group.gid, index, "scores", score, "must be finite")


def check_sequence(group: Group, index: int, limits: Limits, *, scored: int) -> Untrainable | None:
    """Why a sequence stays outside the model, if it does. `scored`: how many sequences of its group have a score."""

    def no(field: str, value: Any, rule: str) -> Untrainable:
        return Untrainable(group.gid, index, field, value, rule)

    for name, rule in NOT_MAPPED.items():
        if value := group.rest.get(name):
            return no(name, f"{len(value)} values" if isinstance(value, list) else type(value).__name__, rule)
    ids = group.tokens[index]
    if not len(ids) or len(ids) > limits.max_tokens:
        return no("tokens", f"{len(ids)} tokens", f"must have 1 to {limits.max_tokens}, what the model can hold")
    if not (id_ := int(ids.min())) >= 0 or not (id_ := int(ids.max())) < limits.vocab_size:
        return no("tokens", id_, f"ids must be from 0 to {limits.vocab_size - 1}, the model's vocabulary")
    for name in ("masks", *TOKEN_FIELDS):
        rows = getattr(group, name)
        if not rows and name != "masks":  # some environments send an empty list for "none"
            continue
        if index >= len(rows) or len(rows[index]) != len(ids):
            count = len(rows[index]) if index < len(rows) else 0
            return no(name, f"{count} values", f"must be as long as its tokens, {len(ids)}")
        if not (finite := np.isfinite(rows[index])).all():
            return no(name, float(rows[index][int(finite.argmin())]), "must be finite")
    if not len(targets(group, index)):
        return no("masks", NOT_TRAINED, "must train at least one token after the first")
    if limits.compares and scored < 2 and not group.advantages:
        return no("scores", f"{scored} sequence", "must have others of its group to be compared with, or advantages")
    return None

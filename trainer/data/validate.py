"""Which sequences can't be trained, and why: said for each, so that whoever sent it can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lachesis.broker.records.groups import Group

NOT_TRAINED = -100
TOKEN_FIELDS = ("advantages", "inference_logprobs", "ref_logprobs")
DISTILL_FIELDS = ("distill_token_ids", "distill_logprobs")


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
    distills: bool  # whether the loss has a term for a teacher's tokens


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

    if images := group.rest.get("images"):
        return no(
            "images",
            f"{len(images)} values" if isinstance(images, list) else type(images).__name__,
            "only text can be trained",
        )
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
    if fault := _distillation_fault(group, index, limits):
        return no(*fault)
    if not len(targets(group, index)):
        return no("masks", NOT_TRAINED, "must train at least one token after the first")
    if limits.compares and scored < 2 and not group.advantages:
        return no("scores", f"{scored} sequence", "must have others of its group to be compared with, or advantages")
    return None


def _distillation_fault(group: Group, index: int, limits: Limits) -> tuple[str, Any, str] | None:
    ids, log_probs = (group.rest.get(name) or [] for name in DISTILL_FIELDS)
    if (ids or log_probs) and not limits.distills:
        name, rows = (DISTILL_FIELDS[0], ids) if ids else (DISTILL_FIELDS[1], log_probs)
        return name, f"{len(rows)} values", "is trained on with distillation.enabled=true only"
    for name, rows in zip(DISTILL_FIELDS, (ids, log_probs), strict=True):
        if (ids or log_probs) and (index >= len(rows) or len(rows[index]) != len(group.tokens[index])):
            count = len(rows[index]) if index < len(rows) else 0
            return name, f"{count} values", f"must be as long as its tokens, {len(group.tokens[index])}"
    pairs = zip(ids[index], log_probs[index], strict=True) if ids else ()
    for place, (some_ids, some) in enumerate(pairs):
        if len(some_ids) != len(some):
            return f"distill_logprobs[{place}]", f"{len(some)} values", f"must be one per token id, {len(some_ids)}"
        if not all(0 <= id_ < limits.vocab_size for id_ in some_ids):
            return f"distill_token_ids[{place}]", some_ids, f"ids must be from 0 to {limits.vocab_size - 1}"
        if not all(math.isfinite(value) for value in some):
            return f"distill_logprobs[{place}]", some, "must be finite"
    return None

"""Can this group be trained? Shapes agree, numbers are finite, lengths are within what the trainer registered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lachesis.broker.errors import InvalidGroup
from lachesis.broker.records import Group, Spans

NEWEST = 2**53  # no version is newer: Lua and JavaScript count so far
TOKEN_FIELDS = ("masks", "advantages", "ref_logprobs", "inference_logprobs")


def check_group(group: Group, *, max_token_len: int = -1, batch_size: int = -1) -> None:
    """Raise InvalidGroup, naming field, value and rule, unless every sequence can be trained.

    Args:
        max_token_len: longest sequence the trainer takes, in tokens; not positive: no limit.
        batch_size: sequences of one step; a larger group could never enter a batch. Not positive: not known.
    """
    count = len(group.tokens)
    if count == 0:
        raise InvalidGroup("tokens", [], "must hold at least one sequence")
    if 0 < batch_size < count:
        raise InvalidGroup("tokens", f"{count} sequences", f"must not exceed the trainer's batch_size of {batch_size}")
    if len(group.scores) != count:
        raise InvalidGroup("scores", f"{len(group.scores)} values", f"must have one per sequence, {count}")
    _check_finite("scores", group.scores)
    lengths = list(map(len, group.tokens))
    for index, length in enumerate(lengths):
        if length == 0:
            raise InvalidGroup(f"tokens[{index}]", [], "must hold at least one token")
        if 0 < max_token_len < length:
            raise InvalidGroup(
                f"tokens[{index}]",
                f"{length} tokens",
                f"must not exceed the trainer's max_token_len of {max_token_len}",
            )
    if np.concatenate(group.tokens).min() < 0:  # one pass where all is well
        index, lowest = next((i, int(row.min())) for i, row in enumerate(group.tokens) if row.min() < 0)
        raise InvalidGroup(f"tokens[{index}]", lowest, "token ids must not be negative")
    for name in TOKEN_FIELDS:
        _check_rows(name, getattr(group, name), group.tokens)
    if group.versions is not None:
        _check_versions(group.versions, lengths)


def _check_rows(name: str, rows: Sequence[np.ndarray] | None, tokens: Sequence[np.ndarray]) -> None:
    if not rows and name != "masks":  # None, or the empty list some environments send for "none"
        return
    rows = rows or []
    if len(rows) != len(tokens):
        raise InvalidGroup(name, f"{len(rows)} rows", f"must have one per sequence, {len(tokens)}")
    for index, (row, sequence) in enumerate(zip(rows, tokens, strict=True)):
        if len(row) != len(sequence):
            raise InvalidGroup(
                f"{name}[{index}]", f"{len(row)} values", f"must be as long as its tokens, {len(sequence)}"
            )
    if name != "masks" and not np.isfinite(np.concatenate(rows)).all():
        for index, row in enumerate(rows):
            _check_finite(f"{name}[{index}]", row)


def _check_versions(rows: Sequence[Spans], lengths: Sequence[int]) -> None:
    if len(rows) != len(lengths):
        raise InvalidGroup("weight_versions", f"{len(rows)} rows", f"must have one per sequence, {len(lengths)}")
    for index, (spans, length) in enumerate(zip(rows, lengths, strict=True)):
        last = 0
        for number, (version, start, end) in enumerate(spans):
            if not (0 <= version <= NEWEST and last <= start < end <= length):
                rule = f"must be [version, start, end] in order, within the {length} tokens, no version below 0"
                raise InvalidGroup(f"weight_versions[{index}][{number}]", [version, start, end], rule)
            last = end


def _check_finite(name: str, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        position = int(finite.argmin())
        raise InvalidGroup(f"{name}[{position}]", float(values[position]), "must be finite")

"""Groups, as environments post them, to the tensors of one optimizer step. Pure: no verl, no Redis, no randomness.

A sequence's *response* starts at its first trained token and runs to its end. Tool and user tokens inside it are part
of the response but not of `response_mask`, so they are context and never a target. Environments' token-level arrays are
aligned with the tokens they belong to, and so are verl's response-aligned ones: nothing is shifted. Nothing is
truncated either: a sequence enters the model whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lachesis.broker.records import Group

NOT_TRAINED = -100


@dataclass(frozen=True)
class TrainingBatch:
    """N sequences in the order of their groups, n of which enter the model; R is the longest response's length.

    A sequence stays outside the model if none of its tokens is trained, or if it is too long or has a token id the
    model lacks (then it counts in `unfit`); its score still belongs to its group's baseline.
    """

    model: TensorDict  # n rows, jagged: input_ids, position_ids, prompts, responses, response_mask, loss_mask
    rows: Tensor  # int64 (n,): which of the N sequences they are
    response_mask: Tensor  # int64 (N, R): 1 on trained tokens; rows outside the model are 0
    token_level_rewards: (
        Tensor  # float32 (N, R): the score, on the last trained token (outside the model: on the first)
    )
    rollout_log_probs: Tensor  # float32 (N, R): the sampler's, in nats; 0 where unknown
    rollout_known: Tensor  # bool (N, R): trained tokens whose sampler's log-prob is known
    advantages_given: Tensor  # float32 (N, R): the environment's own, 0 elsewhere
    is_given: Tensor  # bool (N,): sequences whose environment sent advantages
    set_to_zero: Tensor  # bool (N,): sequences whose advantage is zeroed after normalisation
    uids: np.ndarray  # object (N,): the group of each sequence
    group_sizes: Tensor  # int64 (N,)
    scores: Tensor  # float64 (N,)
    temperature: float | Tensor  # of sampling; float32 (n,) where it differs between sequences
    tokens: int  # of all N sequences
    unfit: int
    filler: int = 0  # rows at the end of `model` that are no sequences and train nothing

    def jagged(self, padded: Tensor) -> Tensor:
        """The model's rows of an (N, R) tensor, as a jagged one of their response lengths."""
        offsets = self.model["responses"].offsets()
        mine = torch.nn.functional.pad(padded[self.rows], (0, 0, 0, self.filler))
        found: Tensor = torch.nested.nested_tensor_from_jagged(mine[self._in_response], offsets)
        return found

    def padded(self, jagged: Tensor) -> Tensor:
        """The inverse: (N, R), 0 outside the model and beyond the responses."""
        mine = jagged.values().new_zeros(self._in_response.shape)
        mine[self._in_response] = jagged.values()
        everyone = mine.new_zeros(self.response_mask.shape)
        everyone[self.rows] = mine[: len(self.rows)]
        return everyone

    def part(self, places: Sequence[int], *, filler: int) -> TrainingBatch:
        """The same batch with only some of the model's rows, and `filler` rows after them; all else stays."""
        columns = {}
        for name, column in self.model.items():
            rows = column.unbind()
            fill = torch.arange(2) if name == "position_ids" else torch.zeros(2 if name == "input_ids" else 1)
            columns[name] = _jagged([rows[place].numpy() for place in places] + [fill.numpy()] * filler)
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = torch.cat([temperature[list(places)], temperature.new_ones(filler)])
        return replace(
            self,
            model=TensorDict(columns, batch_size=[len(places) + filler]),
            rows=self.rows[list(places)],
            temperature=temperature,
            filler=filler,
        )

    @property
    def _in_response(self) -> Tensor:
        lengths: Tensor = self.model["responses"].offsets().diff()
        return torch.arange(self.response_mask.shape[1]) < lengths[:, None]


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
    log_probs, has_log_probs = _aligned([group.inference_logprobs for group in groups], groups, start_of, width)
    # environments write 1.0 for "none here"; no log-probability is above 0
    known = response_mask.astype(bool) & has_log_probs[:, None] & (log_probs <= 0)
    advantages, is_given = _aligned([group.advantages for group in groups], groups, start_of, width)

    return TrainingBatch(
        model=_model_rows(tokens, starts, trained),
        rows=torch.tensor(rows, dtype=torch.int64),
        response_mask=torch.from_numpy(response_mask),
        token_level_rewards=torch.from_numpy(rewards),
        rollout_log_probs=torch.from_numpy(np.where(known, log_probs, np.float32(0))),
        rollout_known=torch.from_numpy(known),
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
    response_mask = _jagged(trained)
    columns = {
        "input_ids": _jagged(tokens),
        "position_ids": _jagged([np.arange(len(ids)) for ids in tokens]),
        "prompts": _jagged([ids[:start] for ids, start in zip(tokens, starts, strict=True)]),
        "responses": _jagged([ids[start:] for ids, start in zip(tokens, starts, strict=True)]),
        "response_mask": response_mask,
        "loss_mask": response_mask,
    }
    return TensorDict(columns, batch_size=[len(tokens)])


def _jagged(parts: Sequence[np.ndarray]) -> Tensor:
    """int64, a row each."""
    offsets = np.cumsum([0, *map(len, parts)])
    values = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
    found: Tensor = torch.nested.nested_tensor_from_jagged(torch.from_numpy(values), torch.from_numpy(offsets))
    return found


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

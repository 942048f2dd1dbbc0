"""One step's sequences as tensors: what collate.py makes of groups and the Learner trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lachesis.trainer.data.validate import Untrainable

_PER_SEQUENCE = (
    *("response_mask", "token_level_rewards", "rollout_log_probs", "rollout_known", "ref_log_probs"),
    *("ref_known", "advantages_given", "is_given", "set_to_zero", "places", "group_sizes", "scores"),
)


@dataclass(frozen=True)
class TrainingBatch:
    """N sequences in the order of their groups, n of which enter the model; R is the longest response's length.

    The others are in `untrainable`, each with a reason. Their scores still belong to their groups' baselines; only a
    sequence that has no score is none of the N.
    """

    model: TensorDict  # n rows, jagged: input_ids, position_ids, prompts, responses, response_mask, loss_mask,
    # and with distillation teacher_ids, teacher_logprobs (see distillation.py)
    rows: Tensor  # int64 (n,): which of the N sequences they are
    response_mask: Tensor  # int64 (N, R): 1 on trained tokens; rows outside the model are 0
    token_level_rewards: (
        Tensor  # float32 (N, R): the score, on the last trained token (outside the model: on the first)
    )
    rollout_log_probs: Tensor  # float32 (N, R): the sampler's, in nats; 0 where unknown
    rollout_known: Tensor  # bool (N, R): trained tokens whose sampler's log-prob is known
    ref_log_probs: Tensor  # float32 (N, R): the reference's, as sent, in nats; 0 where unknown
    ref_known: Tensor  # bool (N, R): trained tokens whose reference's log-prob was sent
    advantages_given: Tensor  # float32 (N, R): the environment's own, 0 elsewhere
    is_given: Tensor  # bool (N,): sequences whose environment sent advantages
    set_to_zero: Tensor  # bool (N,): sequences whose advantage is zeroed after normalisation
    uids: np.ndarray  # object (N,): the group of each sequence
    places: Tensor  # int64 (N,): which of its group's sequences each is
    group_sizes: Tensor  # int64 (N,)
    scores: Tensor  # float64 (N,)
    temperature: float | Tensor  # of sampling; float32 (n,) where it differs between sequences
    tokens: int  # of all N sequences
    untrainable: tuple[Untrainable, ...]
    filler: int = 0  # rows at the end of `model` that are no sequences and train nothing

    @property
    def unfit(self) -> int:
        """Sequences that the trainer can't use, besides those that train nothing on purpose."""
        return sum(reason.field != "masks" for reason in self.untrainable)

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

    def only(self, kept: Tensor) -> TrainingBatch:
        """The batch without the sequences where `kept`, bool (N,), is false: as if they had never been posted."""
        in_model = kept[self.rows]
        columns = {name: _rows_of(column, in_model) for name, column in self.model.items()}
        temperature = self.temperature[in_model] if isinstance(self.temperature, Tensor) else self.temperature
        return replace(
            self,
            model=TensorDict(columns, batch_size=[int(in_model.sum())]),
            rows=(kept.cumsum(0) - 1)[self.rows[in_model]],
            uids=self.uids[kept.numpy()],
            temperature=temperature,
            **{name: getattr(self, name)[kept] for name in _PER_SEQUENCE},
        )

    def part(self, places: Sequence[int], *, filler: int) -> TrainingBatch:
        """The same N sequences with only some of the model's rows, in their order, and `filler` rows after them."""
        mine = torch.zeros(len(self.rows), dtype=torch.bool)
        mine[list(places)] = True
        columns = {name: _filled(name, _rows_of(column, mine), filler) for name, column in self.model.items()}
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = torch.cat([temperature[mine], temperature.new_ones(filler)])
        model = TensorDict(columns, batch_size=[len(places) + filler])
        return replace(self, model=model, rows=self.rows[mine], temperature=temperature, filler=filler)

    @property
    def _in_response(self) -> Tensor:
        lengths: Tensor = self.model["responses"].offsets().diff()
        return torch.arange(self.response_mask.shape[1]) < lengths[:, None]


def _rows_of(jagged: Tensor, kept: Tensor) -> Tensor:
    lengths: Tensor = jagged.offsets().diff()  # type: ignore[attr-defined]  # torch's stubs forget it
    values = jagged.values()[kept.repeat_interleave(lengths)]
    offsets = torch.cat([lengths.new_zeros(1), lengths[kept].cumsum(0)])
    found: Tensor = torch.nested.nested_tensor_from_jagged(values, offsets)
    return found


def _filled(name: str, jagged: Tensor, count: int) -> Tensor:
    """`count` rows more: a prompt of one token and a response of one, which is not trained."""
    values = jagged.values()
    length = 1 if name in ("prompts", "responses", "response_mask", "loss_mask") else 2
    row = values.new_zeros(length, *values.shape[1:])
    if name == "position_ids":
        row = torch.arange(length, dtype=values.dtype)
    offsets = jagged.offsets()  # type: ignore[attr-defined]  # torch's stubs forget it
    offsets = torch.cat([offsets, offsets[-1] + length * torch.arange(1, count + 1)])
    found: Tensor = torch.nested.nested_tensor_from_jagged(torch.cat([values, *[row] * count]), offsets)
    return found

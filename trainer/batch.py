"""One step's sequences as tensors: what mapping.py makes of groups and the Learner trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lachesis.trainer.untrainable import Untrainable

_PER_SEQUENCE = (
    *("response_mask", "token_level_rewards", "rollout_log_probs", "rollout_known", "ref_log_probs"),
    *("ref_known", "advantages_given", "is_given", "set_to_zero", "group_sizes", "scores"),
)


@dataclass(frozen=True)
class TrainingBatch:
    """N sequences in the order of their groups, n of which enter the model; R is the longest response's length.

    The others are in `untrainable`, each with a reason. Their scores still belong to their groups' baselines; only a
    sequence that has no score is none of the N.
    """

    model: TensorDict  # n rows, jagged: input_ids, position_ids, prompts, responses, response_mask, loss_mask,
    # and with distillation teacher_ids, teacher_logprobs (see teacher.py)
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
    group_sizes: Tensor  # int64 (N,)
    scores: Tensor  # float64 (N,)
    temperature: float | Tensor  # of sampling; float32 (n,) where it differs between sequences
    tokens: int  # of all N sequences
    untrainable: tuple[Untrainable, ...]

    @property
    def unfit(self) -> int:
        """Sequences that the trainer can't use, besides those that train nothing on purpose."""
        return sum(reason.field != "masks" for reason in self.untrainable)

    def jagged(self, padded: Tensor) -> Tensor:
        """The model's rows of an (N, R) tensor, as a jagged one of their response lengths."""
        offsets = self.model["responses"].offsets()
        found: Tensor = torch.nested.nested_tensor_from_jagged(padded[self.rows][self._in_response], offsets)
        return found

    def padded(self, jagged: Tensor) -> Tensor:
        """The inverse: (N, R), 0 outside the model and beyond the responses."""
        mine = jagged.values().new_zeros(self._in_response.shape)
        mine[self._in_response] = jagged.values()
        everyone = mine.new_zeros(self.response_mask.shape)
        everyone[self.rows] = mine
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

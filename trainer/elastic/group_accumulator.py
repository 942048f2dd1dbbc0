"""verl's learner as one of several replicas that train each step's groups between them.

verl normalises a loss over the sequences it is given, and a replica sees some of the groups. So the sums of the loss are
taken here (tokens' for token-mean; sequences' for the means over sequences), and divided by the step's own count when all
are summed: the gradient that one trainer has of the whole batch. That is so only of losses that are such sums, and of
advantages that need no other group; algorithms.check_elastic refuses the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.broker.records.steps import BatchEntry, LedgerEntry
from lachesis.trainer.algo.learner import Learner
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.elastic.accumulator import LocalAccumulator
from lachesis.trainer.elastic.collectives.reproducible_sum import ReproducibleSum, total
from lachesis.trainer.elastic.group_stats import (
    GroupStats,
    decode,
    divisor,
    encode,
    ledger_entry,
    merged,
    summarize_group,
)
from lachesis.trainer.engine import state_transfer
from lachesis.trainer.engine.state_transfer import local, trained_parameters
from lachesis.trainer.engine.verl_engine import Engine


class GroupAccumulator(LocalAccumulator):
    """The GradientAccumulator (see accumulator.py) of a replica whose engine sums its loss (algorithms.summed_loss).

    float32 gradients are added up where verl keeps them. With `exact` each group's are added on the host in a way that
    does not depend on their order: all that follows is the same bit for bit, whoever trained which group.
    """

    def __init__(
        self,
        engine: Engine,
        learner: Learner,
        mapping: Callable[[Sequence[Group]], TrainingBatch],
        *,
        divide_by: str,
        exact: bool,
    ) -> None:
        self._engine, self._learner, self._mapping, self._divide_by = engine.worker.engine, learner, mapping, divide_by
        self._parameters = trained_parameters(self._engine)
        self._sizes = [local(parameter).numel() for parameter in self._parameters]
        self._exact = ReproducibleSum(sum(self._sizes)) if exact else None
        self._used = torch.zeros(len(self._parameters), dtype=torch.int64)
        self.metrics: dict[str, float] = {}  # of the newest step
        self.pristine = True  # whether the weights are those that the engine was built with
        self.clear()

    def accumulate(self, batch: BatchEntry, claimed: Sequence[tuple[int, Group]]) -> list[bytes]:
        groups = [group for _, group in claimed]
        parts = [groups] if self._exact is None else [[group] for group in groups]
        return [encode(told) for part in parts for told in self._add(part)]

    def sums(self, device: torch.device) -> list[Tensor]:
        if self._exact is not None:
            return [self._exact.parts.clone(), self._used.clone()]
        flat = torch.zeros(sum(self._sizes), device=device)
        for part, parameter in zip(flat.split(self._sizes), self._parameters, strict=True):
            if parameter.grad is not None:
                part.copy_(local(parameter.grad).reshape(-1))
        self._count_used()
        return [flat, self._used.clamp(max=1)]

    def clear(self) -> None:
        self._drop_gradients()
        self._used.zero_()
        if self._exact is not None:
            self._exact.parts.zero_()

    def apply(self, batch: BatchEntry, sums: Sequence[Tensor], told: Sequence[bytes]) -> None:
        """Nothing is trained where no group has a trained token left: as in Learner.step the schedule goes on."""
        groups = [decode(word) for word in told]
        any_gradient = any(one.places is not None for one in groups)
        gradients = (total(sums[0]) if self._exact is not None else sums[0]) / divisor(groups)
        self.clear()
        for part, parameter, used in zip(gradients.split(self._sizes), self._parameters, sums[1].tolist(), strict=True):
            if used:
                parameter.grad = torch.zeros_like(parameter)
                local(parameter.grad).copy_(part.view_as(local(parameter)))
        self.pristine = False
        self.metrics = merged(groups) | self._learner.update(any_gradient=any_gradient)
        self._drop_gradients()

    def entry(
        self, batch: BatchEntry, before: int, sums: Sequence[Tensor], told: Sequence[bytes]
    ) -> tuple[LedgerEntry, list[DeadEntry]]:
        groups = [decode(word) for word in told]
        loss = merged(groups)["loss"]
        return ledger_entry(batch, before, groups, loss), [letter for one in groups for letter in one.letters]

    def state(self) -> tuple[bytes, list[Tensor]]:
        return state_transfer.give(self._engine)

    def blank(self, header: bytes) -> list[Tensor]:
        return state_transfer.blank(header)

    def load(self, header: bytes, tensors: Sequence[Tensor]) -> None:
        self.pristine = False
        state_transfer.take(self._engine, header, tensors)

    def _add(self, groups: Sequence[Group]) -> list[GroupStats]:
        batch = self._mapping(groups)
        metrics = self._learner.accumulate(batch, sequences=1)
        if self._exact is not None:
            start = 0
            for size, parameter in zip(self._sizes, self._parameters, strict=True):
                if parameter.grad is not None:
                    self._exact.add(local(parameter.grad), start=start)
                start += size
            self._count_used()
            self._drop_gradients()
        return summarize_group(self._learner, batch, [group.gid for group in groups], metrics, self._divide_by)

    def _count_used(self) -> None:
        """Parameters that had a gradient: the others are none of the optimizer's business, as with a single trainer."""
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                self._used[place] = 1

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

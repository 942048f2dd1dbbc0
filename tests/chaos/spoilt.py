"""Replicas that do what none may: the audit of the soak must find it."""

from __future__ import annotations

from collections.abc import Sequence

import elastic_process
import torch
from elastic_process import Settings, TinyCompute
from torch import Tensor

from lachesis.broker.records.groups import Group
from lachesis.broker.records.steps import BatchEntry

AT = 2  # the step that is spoilt


class TrainsOneTwice(TinyCompute):
    def accumulate(self, batch: BatchEntry, claimed: Sequence[tuple[int, Group]]) -> list[bytes]:
        if batch.step == AT and (first := [(place, group) for place, group in claimed if place == 0]):
            super().accumulate(batch, first)
        return super().accumulate(batch, claimed)


class FlipsABit(TinyCompute):
    def apply(self, batch: BatchEntry, sums: Sequence[Tensor], told: Sequence[bytes]) -> None:
        super().apply(batch, sums, told)
        if batch.step == AT:
            self.theta.view(torch.int64)[0] ^= 1


def train_one_twice(settings: Settings, crash_at: str) -> None:
    elastic_process.main(settings, crash_at, TrainsOneTwice)


def flip_a_bit(settings: Settings, crash_at: str) -> None:
    elastic_process.main(settings, crash_at, FlipsABit)

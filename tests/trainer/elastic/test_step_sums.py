"""What replicas sum in a step, and tell each other of its groups, over a real gloo."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from elastic_process import TinyCompute
from scored import group
from test_collectives import connected, nothing
from torch import Tensor
from trainer_kit import stored

from lachesis.broker import BlockingBroker, Conflict
from lachesis.broker.records.steps import BatchEntry
from lachesis.trainer.elastic.claims import ClaimPolicy
from lachesis.trainer.elastic.collectives.base import Alone
from lachesis.trainer.elastic.step_sums import SLOT, digest, sum_over_replicas

GIDS = ("g0", "g1", "g2", "g3")
BATCH = BatchEntry(1, GIDS, 8, 32, 0, 0, 0.0)
WORDS = [b"", b"\x00\xff" * 5, b"exactly" + bytes(SLOT - 7), b"long" * SLOT]


def replica(*places: int) -> TinyCompute:
    accumulator = TinyCompute()
    accumulator.accumulate(BATCH, [(place, stored(group(place))) for place in places])
    return accumulator


def summed(
    broker: BlockingBroker, shares: Mapping[TinyCompute, dict[int, bytes]]
) -> list[tuple[list[Tensor], list[bytes]]]:
    reducers = connected(broker, "gloo", len(shares))
    with ThreadPoolExecutor(len(shares)) as pool:
        tasks = [
            pool.submit(sum_over_replicas, reducer, BATCH, accumulator, held, ClaimPolicy(), nothing)
            for reducer, (accumulator, held) in zip(reducers, shares.items(), strict=True)
        ]
        found = [task.result() for task in tasks]
    for one in reducers:
        one.close()
    return found


@pytest.mark.parametrize("shares", [[(0, 3), (1,), (2,)], [(0, 1, 2, 3), ()]], ids=["three", "one_has_none"])
def test_all_get_the_sums_and_every_word(blocking: BlockingBroker, shares: list[tuple[int, ...]]) -> None:
    found = summed(blocking, {replica(*places): {place: WORDS[place] for place in places} for places in shares})
    alone = sum_over_replicas(Alone(), BATCH, replica(0, 1, 2, 3), dict(enumerate(WORDS)), ClaimPolicy(), nothing)
    for sums, words in (*found, alone):
        assert words == WORDS
        assert digest(sums, words) == digest(*alone)


def test_a_group_that_two_have_or_none_is_not_trained(blocking: BlockingBroker) -> None:
    with pytest.raises(Conflict, match=r"sums \[1, 2, 0, 1\] times; nothing was committed"):
        summed(blocking, {replica(0, 1): dict.fromkeys((0, 1), b"a"), replica(1, 3): dict.fromkeys((1, 3), b"b")})

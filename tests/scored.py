"""Groups for every room's tests: one by hand, and every valid one by hypothesis."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.steps import BatchEntry, LedgerEntry

token_ids = st.one_of(st.integers(0, 150_000), st.integers(0, 2**63 - 1))
labels = st.one_of(st.just(-100), st.integers(-(2**63), 2**63 - 1), st.integers(0, 150_000))
numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False)
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)


@st.composite
def spans(draw: st.DrawFn, length: int) -> tuple[tuple[int, int, int], ...]:
    """(version, start, end) in order, over some of `length` tokens."""
    edges = sorted(draw(st.sets(st.integers(0, length))))
    return tuple((draw(st.integers(0, 2**53)), *pair) for pair in pairwise(edges) if draw(st.booleans()))


@st.composite
def scored_groups(draw: st.DrawFn) -> ScoredGroup:
    """Any group that passes `check_group`."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))

    def rows(values: st.SearchStrategy[Any]) -> list[list[Any]]:
        return [draw(st.lists(values, min_size=length, max_size=length)) for length in lengths]

    def maybe(values: st.SearchStrategy[Any]) -> list[list[Any]] | None:
        return draw(st.sampled_from((lambda: None, list, lambda: rows(values))))()

    def top_k(values: st.SearchStrategy[Any]) -> list[list[list[Any]]]:
        return [[draw(st.lists(values, max_size=2)) for _ in range(length)] for length in lengths]

    def optional(value: st.SearchStrategy[Any]) -> Any:
        return draw(st.one_of(st.none(), value))

    return ScoredGroup(
        tokens=rows(token_ids),
        masks=rows(labels),
        scores=[draw(numbers) for _ in lengths],
        advantages=maybe(numbers),
        ref_logprobs=maybe(numbers),
        inference_logprobs=maybe(numbers),
        messages=optional(st.lists(st.lists(json_objects, max_size=2), max_size=2)),
        generation_params=optional(json_objects),
        group_overrides=optional(json_objects),
        overrides=optional(st.lists(json_objects, max_size=2)),
        images=draw(json_values),
        env_id=optional(st.integers(0, 2**63 - 1)),
        distill_token_ids=draw(st.sampled_from((lambda: None, lambda: top_k(token_ids))))(),
        distill_logprobs=draw(st.sampled_from((lambda: None, lambda: top_k(numbers))))(),
        weight_versions=draw(st.sampled_from((lambda: None, lambda: [draw(spans(length)) for length in lengths])))(),
    )


def group(number: int, size: int = 2, env_id: int | None = 0) -> ScoredGroup:
    """A group of `size` sequences of three tokens, different for every `number`."""
    tokens = [[1, number, index] for index in range(size)]
    return ScoredGroup(
        tokens=tokens,
        masks=[[-100, *row[1:]] for row in tokens],
        scores=[float(index % 2) for index in range(size)],
        inference_logprobs=[[1.0, -0.5, -0.25] for _ in range(size)],
        env_id=env_id,
    )


def trained(batch: BatchEntry, replica: str = "r") -> LedgerEntry:
    return LedgerEntry(
        step=batch.step, gids=batch.gids, n=batch.n, tok=batch.tok, v_before=batch.step - 1, v_after=batch.step,
        v_min=batch.v_min, lag=0, replica=replica, reward=0.5, loss=0.1, seconds=1.0,
    )  # fmt: skip

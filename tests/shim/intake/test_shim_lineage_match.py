"""Sequences of any number of turns are joined with the generations they were made of, as a slow reference says."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lachesis.broker.records.entries import prefix_digests, tokens_digest
from lachesis.broker.records.groups import Group, Lineage, ScoredGroup
from lachesis.broker.records.packing import to_arrays
from lachesis.shim.intake.lineage_match import Joined, covers, digests, join, mismatched, places

Row = tuple[list[int], list[bool]]  # tokens, and which are trained


class Turn(NamedTuple):
    """What an environment wrote (untrained), and what was generated then."""

    given: list[int]
    made: list[int]
    versions: list[int]  # of each generated token
    known: bool  # whether the front door recorded it


ids = st.lists(st.integers(0, 300), max_size=4)


@st.composite
def turns(draw: st.DrawFn) -> list[Turn]:
    found = []
    for index in range(draw(st.integers(1, 4))):
        given_ids = draw(ids.filter(len))
        made = draw(ids.filter(len))
        versions = sorted(draw(st.lists(st.integers(0, 3), min_size=len(made), max_size=len(made))))
        found.append(Turn(given_ids, [1000 + index, *made][: len(made)], versions, draw(st.booleans())))
    return found


def lineage_of(turn: Turn) -> Lineage:
    cuts = [0, *(i for i in range(1, len(turn.made)) if turn.versions[i] != turn.versions[i - 1]), len(turn.made)]
    spans = tuple((turn.versions[left], left, right) for left, right in pairwise(cuts))
    log_probs = np.array([-float(token % 7) for token in turn.made], "<f4").tobytes()
    return Lineage(min(turn.versions), max(turn.versions), spans, log_probs)


def group_of(rows: list[Row]) -> Group:
    masks = [[token if yes else -100 for token, yes in zip(*row, strict=True)] for row in rows]
    return to_arrays(ScoredGroup([tokens for tokens, _ in rows], masks, [0.0] * len(rows)))


@given(st.lists(turns(), min_size=1, max_size=3), ids)
def test_every_turn_is_found(sequences: list[list[Turn]], tail: list[int]) -> None:
    store: dict[str, Lineage] = {}
    rows: list[Row] = []
    for sequence in sequences:
        tokens, trained = [], []
        for turn in sequence:
            tokens += turn.given + turn.made
            trained += [False] * len(turn.given) + [True] * len(turn.made)
            if turn.known:
                store[tokens_digest(tokens)] = lineage_of(turn)
        rows.append((tokens + tail, trained + [False] * len(tail)))

    group = group_of(rows)
    found = places(group)
    lineages = iter([store.get(digest) for digest in digests(group, found)])
    for (tokens, _), place, sequence in zip(rows, found, sequences, strict=True):
        joined = join(len(tokens), place, [next(lineages) for _ in place.ends])
        at, versions, log_probs, whole = 0, {}, {}, True
        for turn in sequence:
            at += len(turn.given)
            prefix = tokens[: at + len(turn.made)]
            recorded = store.get(tokens_digest(prefix))  # another sequence may have had this turn, and recorded it
            whole = whole and recorded is not None
            for index, token in enumerate(turn.made):
                if recorded is not None:
                    versions[at + index] = next(v for v, start, end in recorded.spans if start <= index < end)
                    log_probs[at + index] = -float(token % 7)
            at += len(turn.made)
        assert {i: v for v, start, end in joined.spans for i in range(start, end)} == versions
        assert sum(end - start for _, start, end in joined.spans) == len(versions)
        assert joined.whole == whole
        assert covers(joined.spans, place, len(tokens)) == whole
        row = [1.0] * len(tokens) if joined.log_probs is None else joined.log_probs.tolist()
        assert row == [log_probs.get(index, 1.0) for index in range(len(tokens))]


@given(st.lists(st.one_of(st.integers(0, 9), st.just(2**40)), min_size=1, max_size=9), st.data())
def test_prefixes_hash_as_whole_sequences_do(tokens: list[int], data: st.DataObject) -> None:
    ends = sorted(data.draw(st.sets(st.integers(1, len(tokens)), min_size=1)))
    assert prefix_digests(np.array(tokens), ends) == [tokens_digest(tokens[:end]) for end in ends]


@given(st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=4))
def test_runs_are_read_off_the_masks(masks: list[list[bool]]) -> None:
    rows = [([1] * len(mask), mask) for mask in masks]
    for mask, place in zip(masks, places(group_of(rows)), strict=True):
        inside = {index for start, end in place.runs for index in range(start, end)}
        assert inside == {index for index, yes in enumerate(mask) if yes}
        assert all(right < left for (_, right), (left, _) in pairwise(place.runs))
        assert place.ends == sorted({*(end for _, end in place.runs), len(mask)})


def test_masks_that_do_not_fit_have_no_runs() -> None:
    group = to_arrays(ScoredGroup([[1, 2], [3]], [[1]], [0.0]))
    assert [(place.runs, place.ends) for place in places(group)] == [([], [2]), ([], [1])]


def test_of_a_generation_that_is_trained_in_part_only_that_part_counts() -> None:
    place = places(group_of([([9, 1, 2, 3], [False, False, True, False])]))[0]
    lineage = Lineage(3, 4, ((3, 0, 2), (4, 2, 3)), np.array([-1, -2, -3], "<f4").tobytes())
    joined = join(4, place, [None, lineage])
    assert (joined.spans, joined.whole) == (((3, 2, 3),), True)
    assert joined.log_probs is not None
    assert joined.log_probs.tolist() == [1.0, 1.0, -2.0, 1.0]


def test_a_prompt_that_is_trained_is_not_covered() -> None:
    place = places(group_of([([9, 1, 2], [True, True, True])]))[0]
    joined = join(3, place, [Lineage(3, 3, ((3, 0, 2),))])
    assert (joined.spans, joined.whole) == (((3, 1, 3),), False)


def test_only_log_probs_that_both_know_can_differ() -> None:
    known, unknown = Joined((), True, np.array([1.0, -0.5, -0.5], "<f4")), Joined((), True, None)
    same, other = np.array([-9.0, -0.50005, 1.0]), np.array([1.0, -0.5, -0.5002])
    assert mismatched([same, other], [known, unknown]) == 0
    assert mismatched([same, other, other], [known] * 3) == 2
    assert mismatched([other], [unknown]) == 0

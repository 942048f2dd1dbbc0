"""Which generations a posted sequence is made of.

A front door keeps each finished generation under a hash of all its tokens, prompt and output. In a sequence of several
turns the prompt of a turn is everything before it, so hashing the sequence up to the end of each run of trained tokens
finds them all. Pure, and one pass over the tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lachesis.broker.records.entries import prefix_digests
from lachesis.broker.records.groups import Group, Lineage, Spans

NOT_TRAINED = -100
UNKNOWN = 1.0  # in the place of a log-prob: none can be above 0
TOLERANCE = 1e-4  # nats between a log-prob that was posted and the sampler's
MOST_ENDS = 512  # of one sequence; the last ones are looked for


class Places(NamedTuple):
    """Where in a sequence something was generated: it can be read off the mask."""

    runs: list[tuple[int, int]]  # maximal runs of trained tokens, [start, end)
    ends: list[int]  # where generations may end: where a run does, and at the sequence's end


class Joined(NamedTuple):
    """What is known of the making of one sequence."""

    spans: Spans  # over its trained tokens
    whole: bool  # whether they cover all of them
    log_probs: np.ndarray | None  # float32 per token, UNKNOWN where not known; None if not known anywhere


def places(group: Group) -> list[Places]:
    """Of each sequence. Where masks and tokens do not agree, which is refused later, there are no runs."""
    lengths = list(map(len, group.tokens))
    if not lengths or list(map(len, group.masks)) != lengths:
        return [Places([], [length]) for length in lengths]
    trained = np.concatenate(group.masks) != NOT_TRAINED  # of all sequences: numpy's calls cost more than their work
    changes = (np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist()
    found, start = [], 0
    for length in lengths:
        end = start + length
        inside = changes[bisect_right(changes, start) : bisect_left(changes, end)]
        stretches = list(pairwise([start, *inside, end]))  # trained and not trained, in turn
        first = 0 if length and trained[start] else 1
        runs = [(left - start, right - start) for left, right in stretches[first::2]]
        ends = [right for _, right in runs]
        if not ends or ends[-1] != length:
            ends.append(length)
        found.append(Places(runs, ends[-MOST_ENDS:]))
        start = end
    return found


def digests(group: Group, found: Sequence[Places]) -> list[str]:
    """Of every end of every sequence, in order."""
    return [
        digest for row, place in zip(group.tokens, found, strict=True) for digest in prefix_digests(row, place.ends)
    ]


def join(length: int, place: Places, lineages: Sequence[Lineage | None]) -> Joined:
    """Put together what is known of a sequence: `lineages` holds what ended at each of its ends."""
    made = {end: lineage for end, lineage in zip(place.ends, lineages, strict=True) if lineage and lineage.spans}
    spans: list[tuple[int, int, int]] = []
    log_probs: np.ndarray | None = None
    whole = True
    for run_start, run_end in place.runs:
        lineage, end = made.get(run_end), run_end
        if lineage is None:  # what was generated may reach further than what is trained of it
            lineage, end = made.get(length), length
        start = end - lineage.spans[-1][2] if lineage else end
        whole = whole and 0 <= start <= run_start
        if lineage is None or not 0 <= start < run_end:
            continue
        for version, left, right in lineage.spans:
            first, last = max(start + left, run_start), min(start + right, run_end)
            if first < last:
                spans.append((version, first, last))
        if lineage.log_probs and len(lineage.log_probs) == 4 * (end - start):
            if log_probs is None:
                log_probs = np.full(length, UNKNOWN, dtype="<f4")
            first = max(start, run_start)
            log_probs[first:run_end] = np.frombuffer(lineage.log_probs, dtype="<f4")[first - start : run_end - start]
    return Joined(tuple(spans), whole, log_probs)


def covers(spans: Spans, place: Places, length: int) -> bool:
    """Whether spans leave no trained token of a sequence out."""
    known = np.zeros(length, dtype=bool)
    for _, start, end in spans:
        known[start:end] = True
    return all(known[start:end].all() for start, end in place.runs)


def mismatched(posted: Sequence[np.ndarray], joined: Sequence[Joined]) -> int:
    """Sequences whose posted log-probs are not those of the generations that their tokens were joined with."""
    pairs = [(row, each.log_probs) for row, each in zip(posted, joined, strict=True) if each.log_probs is not None]
    if not pairs or not _differ(*(np.concatenate(rows) for rows in zip(*pairs, strict=True))):  # one pass: all is well
        return 0
    return sum(_differ(*pair) for pair in pairs)


def _differ(posted: np.ndarray, sampled: np.ndarray) -> bool:
    apart = np.abs(posted - sampled) > TOLERANCE
    return bool((apart & (posted <= 0) & (sampled <= 0)).any())

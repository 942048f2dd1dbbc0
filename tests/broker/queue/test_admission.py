"""What can't be trained is named: field, value, rule."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from scored import group

from lachesis.broker import InvalidGroup
from lachesis.broker.queue.admission import check_fits, check_group
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.packing import to_arrays

SPOILT = {
    "no sequence": ({"tokens": [], "masks": [], "scores": []}, "tokens = []: must hold at least one sequence"),
    "a score too few": ({"scores": [1.0]}, "scores = '1 values': must have one per sequence, 2"),
    "an infinite score": ({"scores": [1.0, math.inf]}, "scores[1] = inf: must be finite"),
    "an empty sequence": ({"tokens": [[1], []]}, "tokens[1] = []: must hold at least one token"),
    "a negative token": ({"tokens": [[1, 2, -3], [1, 2, 3]]}, "tokens[0] = -3: token ids must not be negative"),
    "no masks": ({"masks": []}, "masks = '0 rows': must have one per sequence, 2"),
    "a short mask": ({"masks": [[1], [1, 2, 3]]}, "masks[0] = '1 values': must be as long as its tokens, 3"),
    "a NaN": ({"advantages": [[0.0] * 3, [0.0, math.nan, 0.0]]}, "advantages[1][1] = nan: must be finite"),
    "a row too many": ({"ref_logprobs": [[0.0] * 3] * 3}, "ref_logprobs = '3 rows': must have one per sequence, 2"),
}


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_group_is_refused_in_words(change: dict[str, object], message: str) -> None:
    scored = group(1)
    for name, value in change.items():
        setattr(scored, name, value)
    with pytest.raises(InvalidGroup) as refused:
        check_group(to_arrays(scored))
    assert str(refused.value) == message


@pytest.mark.parametrize("check", [check_group, check_fits])
def test_limits_are_inclusive_and_optional(check: Callable[..., None]) -> None:
    check(to_arrays(group(1)), max_token_len=3, batch_size=2)
    check(to_arrays(group(1)), max_token_len=-1, batch_size=-1)
    with pytest.raises(InvalidGroup, match="max_token_len of 2"):
        check(to_arrays(group(1)), max_token_len=2)
    with pytest.raises(InvalidGroup, match="batch_size of 1"):
        check(to_arrays(group(1)), batch_size=1)


def test_sums_that_overflow_are_not_infinite_values() -> None:
    large = ScoredGroup(tokens=[[1, 2]], masks=[[1, 2]], scores=[0.0], advantages=[[1.5e308, 1.5e308]])
    check_group(to_arrays(large))


def test_empty_lists_mean_none() -> None:
    scored = ScoredGroup(tokens=[[1]], masks=[[1]], scores=[0.0], advantages=[], inference_logprobs=[])
    check_group(to_arrays(scored))

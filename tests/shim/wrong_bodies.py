"""Bodies with something wrong, for the tests that compare refusals and for those that only want to see them survived."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from trajectories import ENV, TRAINER, group

SCALE = 1 if settings().derandomize else 10  # random ones for longer
PROFILE: dict[str, Any] = {"phases": [Phase.generate]}

VALID: dict[str, tuple[str, Any]] = {
    "/register": ("POST", TRAINER),
    "/register-env": ("POST", {**ENV, "min_batch_allocation": 0.5}),
    "/disconnect-env": ("POST", {"env_id": 0}),
    "/status-env": ("GET", {"env_id": 0}),
    "/scored_data": ("POST", None),
    "/scored_data_list": ("POST", None),
}
WHOLE = group(
    1, advantages=[[1.0] * 3] * 2, ref_logprobs=[[1.0] * 3] * 2, messages=[[{"role": "a", "content": "b"}]] * 2,
    generation_params={"t": 1}, inference_logprobs=[[1.0] * 3] * 2, group_overrides={"a": 1}, overrides=[{"b": 2}] * 2,
    images=[1], env_id=3, distill_token_ids=[[[1]]], distill_logprobs=[[[1.0]]],
)  # fmt: skip
WRONG: st.SearchStrategy[Any] = st.sampled_from(
    (None, True, 0, -1, 1.0, 1.5, 2**63, -(2**64), 10**30, 1e300, "", "8", " 8 ", "8.0", "1_0", "0x8", "1e3", "x", "true",
     "ä", [], [None], [[]], [1], ["1"], [[1.5]], [[["2"]]], {}, {"role": 1}, [[{"role": 1}]], [{"0": 1}], {"env_id": 1})
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*here, key))


def with_change(value: Any, place: tuple[Any, ...], change: Any) -> Any:
    """A copy with another value at that place; ABSENT takes it away."""
    if not place:
        return change
    copy = dict(value) if isinstance(value, dict) else list(value)
    if change is ABSENT and len(place) == 1:
        del copy[place[0]]
    else:
        copy[place[0]] = with_change(copy[place[0]], place[1:], change)
    return copy


ABSENT = object()


@st.composite
def wrong_bodies(draw: st.DrawFn) -> tuple[str, str, Any]:
    """Method, path and a JSON body that one or two changes have made another than the valid one."""
    path = draw(st.sampled_from(tuple(VALID)))
    method, body = VALID[path]
    body = body or ([WHOLE, WHOLE] if path.endswith("list") else WHOLE)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(list(places(body))))
        body = with_change(body, place, draw(WRONG if not place else WRONG | st.just(ABSENT)))
    return method, path, body

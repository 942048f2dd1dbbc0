"""The fast way from JSON into arrays and the lax one give the same groups, or the fast one stands back."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from scored import scored_groups
from trajectories import group

from lachesis.broker import InvalidGroup
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import pack, to_arrays, to_scored
from lachesis.shim.errors import Malformed
from lachesis.shim.intake import json_bodies
from lachesis.shim.intake.simdjson_decoder import read_group, read_groups


def outcome(body: bytes) -> object:
    """What decoding makes of the body: the group and what is stored of it, or the answer that refuses it."""
    try:
        (posted,) = json_bodies.decode_group(body).groups
        return content(to_arrays(posted) if isinstance(posted, ScoredGroup) else posted)
    except Malformed as refused:
        return refused.details
    except InvalidGroup as refused:
        return str(refused)
    except UnicodeEncodeError:
        return "not Unicode"
    except OverflowError:
        return "beyond 64 bits"


def slowly(body: bytes, monkeypatch: pytest.MonkeyPatch) -> object:
    """The same without the fast way."""
    with monkeypatch.context() as patch:
        patch.setattr(json_bodies, "read_group", lambda _: None)
        return outcome(body)


@pytest.fixture(scope="module")
def patch() -> pytest.MonkeyPatch:
    return pytest.MonkeyPatch()


posts = scored_groups().map(lambda scored: structs.replace(scored, messages=_with_roles(scored.messages)))


def _with_roles(messages: list[list[dict[str, Any]]] | None) -> list[list[dict[str, Any]]] | None:
    return messages and [[{**message, "role": "user", "content": None} for message in row] for row in messages]


def content(group: Group) -> tuple[bytes, ScoredGroup]:
    return pack(group), to_scored(group)


@given(posts, st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_every_valid_group_takes_the_fast_way(
    patch: pytest.MonkeyPatch, scored: ScoredGroup, absent: bool, data: st.DataObject
) -> None:
    posted = msgspec.to_builtins(scored)
    if absent:
        posted = {name: value for name, value in posted.items() if value is not None}
    posted = dict(data.draw(st.permutations(list(posted.items())))) | {"unknown": [["["]]}
    body = json.dumps(posted, ensure_ascii=data.draw(st.booleans())).encode()
    direct = read_group(body)
    assert direct is not None
    assert content(direct)[1] == scored
    assert outcome(body) == content(direct) == slowly(body, patch)
    several = read_groups(b"[" + body + b", " + body + b"]")
    assert several is not None
    assert [content(item) for item in several] == [content(direct)] * 2


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, "1", "x", "[", "\ud800", 1.0, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**63, 2**64, -(2**63), 10**30,
     [], [[]], [1], [[1], []], [[1, 2]], {}, {"[": "["}, {"role": "user", "content": 1}]
)  # fmt: skip


@given(posts, st.data())
@settings(max_examples=400, deadline=None)
def test_odd_values_are_read_alike_or_left_to_the_lax_way(
    patch: pytest.MonkeyPatch, scored: ScoredGroup, data: st.DataObject
) -> None:
    """A few values anywhere in the body replaced; some of those bodies are valid still, most are not."""
    posted = msgspec.to_builtins(scored)
    for _ in range(data.draw(st.integers(1, 3))):
        _replace_one(posted, data)
    body = json.dumps(posted).encode()
    assert repr(outcome(body)) == repr(slowly(body, patch))


def _replace_one(place: Any, data: st.DataObject) -> None:
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
        return
    key = data.draw(st.sampled_from(keys))
    if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 4)):
        _replace_one(place[key], data)
    else:
        place[key] = copy.deepcopy(data.draw(ODD))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_spoilt_text_is_left_to_the_lax_way(patch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    body = json.dumps(group(1, messages=[[{"role": "a", "content": "[é\n"}]])).encode()
    place = data.draw(st.integers(0, len(body)))
    junk = data.draw(st.binary(max_size=2) | st.sampled_from([b"[", b"]", b"1", b"\\u005b", b'"', b","]))
    body = body[:place] + junk + body[place + data.draw(st.integers(0, 2)) :]
    assert repr(outcome(body)) == repr(slowly(body, patch))


def spelled(**texts: str) -> bytes:
    """A group's JSON with some values spelled out."""
    values = {"tokens": "[[1, 2], [3]]", "masks": "[[1, 2], [3]]", "scores": "[0, 1]", **texts}
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in values.items()) + "}").encode()


LEFT = {
    "a list that flattens to the right length": spelled(tokens="[[[1, 2], []], [3]]"),
    "hidden behind brackets in text": spelled(tokens="[[[1, 2], []], [3]]", messages='[[{"role": "[", "content": ""}]]'),
    "hidden behind spelled brackets": spelled(tokens="[[[1, 2], []], [3]]", images='["\\u005b\\u005b"]'),
    "hidden behind a key that seems to end": spelled(tokens="[[[1, 2], []], [3]]", **{"y\\u0000": "[]", "y": '["[[["]'}),
    "nested scores": spelled(scores="[[0], [1]]"),
    "a repeated key": spelled()[:-1] + b', "scores": [5, 6]}',
    "text for a number": spelled(tokens='[[1, "2"], [3]]'),
    "a float for an integer": spelled(tokens="[[1, 2.0], [3]]"),
    "a boolean": spelled(scores="[true, 1]"),
    "an integer beyond 64 bits": spelled(masks="[[1, 9223372036854775808], [3]]"),
    "a float beyond 64 bits": spelled(scores="[1e999, 1]"),
    "NaN": spelled(scores="[NaN, 1]"),
    "a key too few": b'{"tokens": [[1]], "masks": [[1]]}',
    "nested too deeply": spelled(images="[" * 2000 + "]" * 2000),
    "a list": b"[]",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT)
def test_what_the_fast_way_leaves(body: bytes) -> None:
    assert read_group(body) is None
    assert read_group(spelled()) is not None  # and the parser is free again


def test_what_else_it_takes() -> None:
    for body in (
        spelled(messages='[[{"role": "[", "content": ["[", "]"]}]]', unknown='["["]'),
        spelled(images='["["]', **{"a [": "1"}),
        spelled(scores="[0, -1]", advantages="[[0, 1], [2]]"),
        spelled(inference_logprobs="null", ref_logprobs="[]"),
    ):
        assert read_group(body) is not None

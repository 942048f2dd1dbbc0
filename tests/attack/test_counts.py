"""What is counted in a body before it is decoded, beside what a decoder finds."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lachesis.broker.records import body_limits
from lachesis.broker.records.body_limits import Counts, TooMany, check_json, check_msgpack

texts = st.text(max_size=8) | st.sampled_from(['[,{"', "\\", '\\"', '"[', "\\\\", ",,,", "é[", "\ud7ff"])
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=40,
)


def containers(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + sum(map(containers, inner))


def finds(check: Any, body: bytes, count: int) -> bool:
    """Whether a check finds that many lists and objects in a body, not one more or less."""
    return not refuses(check, body, count) and (count == 0 or refuses(check, body, count - 1))


def refuses(check: Any, body: bytes, *most: int) -> bool:
    try:
        check(body, *most)
    except TooMany:
        return True
    return False


@given(values, st.integers(1, 9), st.booleans())
@settings(max_examples=150)
def test_lists_and_objects_are_counted_exactly_and_not_those_in_text(value: Any, piece: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_limits, "PIECE_BYTES", piece)  # so that its ends lie everywhere
        assert finds(check_json, body, containers(value))
    assert finds(check_msgpack, msgspec.msgpack.encode(value), containers(value))


@pytest.mark.parametrize("size", [0, 15, 16, 255, 256, 65535, 65536])
def test_every_size_of_messagepack_is_passed_over(size: int) -> None:
    for value in (b"\x90" * size, "[" * size, [0] * size, msgspec.msgpack.Ext(5, b"\x90" * size), -(2**31), 2**63, 1.5):
        check_msgpack(msgspec.msgpack.encode([value, []]), 2 + isinstance(value, list))
        assert refuses(check_msgpack, msgspec.msgpack.encode([value, []]), 1)


def test_values_are_counted_too() -> None:
    numbers = b"[" + b"0," * 999 + b"0]"
    check_json(numbers, 1, 1000)
    assert refuses(check_json, numbers, 1, 999)
    check_msgpack(msgspec.msgpack.encode([0] * 999), 1, 1000)
    assert refuses(check_msgpack, msgspec.msgpack.encode([0] * 1000), 1, 1000)
    with pytest.raises(TooMany, match=r"^body = 7 lists and objects: must hold at most 6$"):
        Counts(7, 7).check(6)


@given(st.binary(max_size=300))
def test_whatever_is_no_messagepack_ends(body: bytes) -> None:
    check_msgpack(body, 10**6)

"""Records survive the way to bytes and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import group, numbers, scored_groups

from lachesis.broker import InvalidGroup
from lachesis.broker.codec import from_entry, gid_of, pack, to_entry, to_scored, tokens_digest, unpack
from lachesis.broker.records import BatchEntry, GroupEntry, LedgerEntry, ScoredGroup
from lachesis.broker.validation import check_group

texts = st.text("abcdef0123456789", min_size=1, max_size=24)
counts = st.integers(0, 2**53)


@given(scored_groups(), st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_valid_group_survives(scored: ScoredGroup, v_min: int, v_max: int) -> None:
    check_group(scored)
    stored = unpack(pack(scored, "g", v_min=v_min, v_max=v_max))
    assert (stored.gid, stored.v_min, stored.v_max) == ("g", v_min, v_max)
    assert to_scored(stored) == scored


@given(st.lists(numbers, min_size=1, max_size=8))
def test_logprobs_take_four_bytes_exactly_where_nothing_is_lost(row: list[float]) -> None:
    scored = ScoredGroup(tokens=[[1] * len(row)], masks=[[1] * len(row)], scores=[0.0], inference_logprobs=[row])
    stored = unpack(pack(scored, "g", v_min=0, v_max=0))
    assert stored.inference_logprobs is not None
    with np.errstate(over="ignore"):
        lossless = all(float(np.float32(value)) == value for value in row)
    assert stored.inference_logprobs[0].dtype == (np.float32 if lossless else np.float64)


def test_integers_take_four_bytes_where_all_fit() -> None:
    narrow, wide = (
        unpack(pack(ScoredGroup(tokens=[[1, top]], masks=[[-100, 1]], scores=[0.0]), "g", v_min=0, v_max=0))
        for top in (2**31 - 1, 2**31)
    )
    assert (narrow.tokens[0].dtype, wide.tokens[0].dtype) == (np.int32, np.int64)
    assert wide.masks[0].dtype == np.int32


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_an_integer_beyond_64_bits_is_named(number: int) -> None:
    with pytest.raises(InvalidGroup, match=r"masks = -?\d+: must fit"):
        pack(ScoredGroup(tokens=[[1]], masks=[[number]], scores=[0.0]), "g", v_min=0, v_max=0)


def test_empty_is_not_absent() -> None:
    scored = group(1)
    scored.advantages, scored.messages, scored.group_overrides, scored.overrides = [], [], {}, []
    back = to_scored(unpack(pack(scored, "g", v_min=0, v_max=0)))
    assert (back.advantages, back.messages, back.group_overrides, back.overrides) == ([], [], {}, [])
    assert back.ref_logprobs is None
    assert back.generation_params is None


def test_ids_depend_on_content_alone() -> None:
    assert gid_of(b"one") == gid_of(b"one") != gid_of(b"two")
    row = [1, 2, 70_000]
    assert len({tokens_digest(row), tokens_digest(np.array(row, "<i4")), tokens_digest(np.array(row, "<i8"))}) == 1
    assert tokens_digest(row) != tokens_digest(row[:2])


@given(
    st.builds(
        GroupEntry, gid=texts, env=texts, n=counts, tok=counts, score_mean=numbers, score_std=numbers, v_min=counts,
        v_max=counts, bytes=counts, codec=texts,
    )
)  # fmt: skip
def test_group_entries_are_text_and_come_back(entry: GroupEntry) -> None:
    _survives(entry)


@given(
    st.builds(
        BatchEntry, step=counts, gids=st.lists(texts, max_size=3).map(tuple), n=counts, tok=counts, v_min=counts,
        v_max=counts, formed_at=st.floats(0, 2e9),
    )
)  # fmt: skip
def test_batch_entries_are_text_and_come_back(entry: BatchEntry) -> None:
    _survives(entry)


@given(
    st.builds(
        LedgerEntry, step=counts, gids=st.lists(texts, max_size=3).map(tuple), n=counts, tok=counts, v_before=counts,
        v_after=counts, v_min=counts, lag=counts, replica=texts, reward=numbers, loss=numbers, seconds=numbers,
        at=st.floats(0, 2e9),
    )
)  # fmt: skip
def test_ledger_entries_are_text_and_come_back(entry: LedgerEntry) -> None:
    _survives(entry)


def _survives(entry: GroupEntry | BatchEntry | LedgerEntry) -> None:
    """Integers and text exactly, floats to the six digits a person reads."""
    text = to_entry(entry)
    back = from_entry(type(entry), {key.encode(): value.encode() for key, value in text.items()})
    for name in entry.__struct_fields__:
        was, now = getattr(entry, name), getattr(back, name)
        assert math.isclose(was, now, rel_tol=1e-5) if isinstance(was, float) else was == now

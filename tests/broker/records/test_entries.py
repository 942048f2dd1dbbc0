"""Ids follow content; records survive the way to stream entries and back."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scored import numbers

from lachesis.broker.records.entries import from_entry, gid_of, to_entry, tokens_digest
from lachesis.broker.records.groups import GroupEntry
from lachesis.broker.records.steps import BatchEntry, LedgerEntry

texts = st.text("abcdef0123456789", min_size=1, max_size=24)
counts = st.integers(0, 2**53)
sequences = st.integers(1, 2**53)


def test_ids_depend_on_content_alone() -> None:
    assert gid_of(b"one") == gid_of(b"one") != gid_of(b"two")
    row = [1, 2, 70_000]
    assert len({tokens_digest(row), tokens_digest(np.array(row, "<i4")), tokens_digest(np.array(row, "<i8"))}) == 1
    assert tokens_digest(row) != tokens_digest(row[:2])


@given(
    st.builds(
        GroupEntry, gid=texts, env=texts, n=sequences, tok=counts, score_mean=numbers, score_std=numbers, v_min=counts,
        v_max=counts, bytes=counts, codec=texts,
    )
)  # fmt: skip
def test_group_entries_are_text_and_come_back(entry: GroupEntry) -> None:
    _survives(entry)


@given(
    st.builds(
        BatchEntry, step=counts, gids=st.lists(texts, max_size=3).map(tuple), n=sequences, tok=counts, v_min=counts,
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

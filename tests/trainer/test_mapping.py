"""Groups to tensors: stated as properties over any group an environment may post."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from trainer_kit import stored

from lachesis.broker.records import Group, ScoredGroup
from lachesis.trainer.mapping import TrainingBatch, to_batch

VOCABULARY, LONGEST = 50, 12
finite = st.floats(-5, 5, width=32)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """One to three groups of one to four sequences; some too long, some with foreign tokens, some without any target."""
    return [draw(_group(), label=f"group {number}") for number in range(draw(st.integers(1, 3)))]


@st.composite
def _group(draw: st.DrawFn) -> Group:
    rows = draw(
        st.lists(st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=LONGEST + 1), min_size=1, max_size=4)
    )
    lengths = [len(row) for row in rows]

    def ragged(values: st.SearchStrategy[Any]) -> list[list[Any]]:
        return [draw(st.lists(values, min_size=length, max_size=length)) for length in lengths]

    overrides = st.fixed_dictionaries(
        {}, optional={"set_advantage_to_zero": st.booleans(), "temperature": st.sampled_from([0.5, 0, "hot"])}
    )
    group = ScoredGroup(
        tokens=rows,
        masks=ragged(st.sampled_from([-100, -100, 1, 7])),
        scores=draw(st.lists(finite, min_size=len(rows), max_size=len(rows))),
        inference_logprobs=draw(st.sampled_from([None, [], "yes"]))
        and ragged(st.sampled_from([1.0, -0.5, -3.25, 0.0])),
        advantages=draw(st.sampled_from([None, [], "yes"])) and ragged(finite),
        overrides=draw(st.sampled_from([None, [], "yes"]))
        and draw(st.lists(overrides, min_size=len(rows), max_size=len(rows))),
    )
    return stored(group)


def mapped(given_groups: list[Group]) -> TrainingBatch:
    return to_batch(given_groups, vocab_size=VOCABULARY, max_tokens=LONGEST)


def sequences(given_groups: list[Group]) -> list[tuple[Group, int]]:
    return [(group, index) for group in given_groups for index in range(len(group.tokens))]


def targets(group: Group, index: int) -> np.ndarray:
    """bool over tokens: trained, and predictable (the first token is not)."""
    trained: np.ndarray = group.masks[index] != -100
    trained[0] = False
    return trained


@given(groups())
@settings(max_examples=80, deadline=None)
def test_sequences_enter_the_model_whole_and_train_exactly_their_targets(these: list[Group]) -> None:
    batch = mapped(these)
    in_model = dict(zip(batch.rows.tolist(), range(len(batch.rows)), strict=True))
    columns = {name: column.unbind() for name, column in batch.model.items()}
    unfit = 0
    for row, (group, index) in enumerate(sequences(these)):
        tokens, wanted = group.tokens[index], targets(group, index)
        fits = len(tokens) <= LONGEST and tokens.max() < VOCABULARY
        unfit += not fits
        assert (row in in_model) == (fits and bool(wanted.any()))
        if row not in in_model:
            assert batch.response_mask[row].sum() == 0
            continue
        mine = {name: column[in_model[row]].numpy() for name, column in columns.items()}
        np.testing.assert_array_equal(mine["input_ids"], tokens)
        np.testing.assert_array_equal(np.concatenate([mine["prompts"], mine["responses"]]), tokens)
        np.testing.assert_array_equal(mine["position_ids"], np.arange(len(tokens)))
        start = len(mine["prompts"])
        assert start >= 1
        assert wanted[start], "a response starts at a target"
        assert not wanted[:start].any()
        np.testing.assert_array_equal(mine["response_mask"], wanted[start:])
        np.testing.assert_array_equal(mine["loss_mask"], wanted[start:])
        np.testing.assert_array_equal(batch.response_mask[row, : len(tokens) - start], wanted[start:])
        assert batch.response_mask[row, len(tokens) - start :].sum() == 0
    assert batch.unfit == unfit


@given(groups())
@settings(max_examples=80, deadline=None)
def test_every_score_is_in_the_rewards_once_and_on_the_last_target(these: list[Group]) -> None:
    batch = mapped(these)
    for row, (group, index) in enumerate(sequences(these)):
        rewards = batch.token_level_rewards[row]
        assert rewards.sum().item() == np.float32(group.scores[index])
        assert (rewards != 0).sum() <= 1
        trained = batch.response_mask[row].nonzero()
        if len(trained) and group.scores[index] != 0:
            assert rewards.nonzero().item() == trained[-1].item()
    assert batch.uids.tolist() == [group.gid for group, _ in sequences(these)]
    assert batch.scores.tolist() == [group.scores[index] for group, index in sequences(these)]
    assert batch.group_sizes.tolist() == [len(group.tokens) for group, _ in sequences(these)]
    assert batch.tokens == sum(len(group.tokens[index]) for group, index in sequences(these))


@given(groups())
@settings(max_examples=80, deadline=None)
def test_token_level_fields_stay_with_their_tokens(these: list[Group]) -> None:
    batch = mapped(these)
    starts = dict(zip(batch.rows.tolist(), batch.model["prompts"].offsets().diff().tolist(), strict=True))
    for row, (group, index) in enumerate(sequences(these)):
        assert bool(batch.is_given[row]) == bool(group.advantages)
        if row not in starts:
            assert not batch.rollout_known[row].any()
            assert not batch.advantages_given[row].any()
            continue
        for place in range(len(group.tokens[index]) - starts[row]):
            token, target = starts[row] + place, bool(batch.response_mask[row, place])
            log_prob = group.inference_logprobs[index][token] if group.inference_logprobs else 1.0
            assert bool(batch.rollout_known[row, place]) == (target and log_prob <= 0)
            assert batch.rollout_log_probs[row, place] == (log_prob if target and log_prob <= 0 else 0)
            advantage = group.advantages[index][token] if group.advantages else 0.0
            assert batch.advantages_given[row, place] == (advantage if target else 0)


@given(groups())
@settings(max_examples=50, deadline=None)
def test_padded_and_jagged_are_inverse(these: list[Group]) -> None:
    batch = mapped(these)
    values = torch.rand(batch.response_mask.shape)
    assert torch.equal(batch.padded(batch.jagged(values * batch.response_mask)), values * batch.response_mask)
    assert torch.equal(batch.jagged(batch.response_mask).values(), batch.model["response_mask"].values())


def one(**fields: Any) -> Group:
    rows = {"tokens": [[5, 6, 7]] * 2, "masks": [[-100, 6, 7]] * 2, "scores": [0.0, 1.0]}
    return stored(ScoredGroup(**{**rows, **fields}))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1.0),
        ({"group_overrides": {"temperature": 0.3}}, 0.3),
        ({"group_overrides": {"temperature": 0.3}, "generation_params": {"temperature": 0.4}}, 0.4),
        ({"generation_params": {"temperature": 0}}, 1.0),
        ({"generation_params": {}, "group_overrides": {}, "overrides": []}, 1.0),
    ],
)
def test_the_temperature_is_that_of_the_nearest_who_says(fields: dict[str, Any], expected: float) -> None:
    assert to_batch([one(**fields)], vocab_size=50, max_tokens=9).temperature == pytest.approx(expected)


def test_sequences_may_have_temperatures_of_their_own() -> None:
    group = one(overrides=[{"temperature": 0.5}, {}], generation_params={"temperature": 0.7})
    temperature = to_batch([group], vocab_size=50, max_tokens=9).temperature
    assert isinstance(temperature, torch.Tensor)
    assert temperature.tolist() == pytest.approx([0.5, 0.7])


def test_zeroing_is_by_sequence() -> None:
    group = one(overrides=[{"set_advantage_to_zero": True}, {"set_advantage_to_zero": False}])
    assert to_batch([group], vocab_size=50, max_tokens=9).set_to_zero.tolist() == [True, False]

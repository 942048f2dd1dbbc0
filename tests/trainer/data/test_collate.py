"""Groups to tensors: stated as properties over any group an environment may post."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from trainer_kit import stored

from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.data.collate import to_batch

VOCABULARY, LONGEST = 50, 12
finite = st.floats(-5, 5, width=32)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """One to three groups of one to four sequences, in every way right or wrong that a shape allows."""
    return [draw(_group(), label=f"group {number}") for number in range(draw(st.integers(1, 3)))]


@st.composite
def _group(draw: st.DrawFn) -> Group:
    rows = draw(
        st.lists(st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=LONGEST + 1), min_size=1, max_size=4)
    )
    lengths = [len(row) for row in rows]
    number = st.one_of(finite, finite, finite, st.just(math.nan)) if draw(st.booleans()) else finite

    def ragged(values: st.SearchStrategy[Any]) -> list[list[Any]]:
        return [draw(st.lists(values, min_size=length, max_size=length)) for length in lengths]

    def maybe(values: Callable[[], Any]) -> Any:
        return draw(st.sampled_from([None, [], "yes"])) and values()

    overrides = st.fixed_dictionaries(
        {}, optional={"set_advantage_to_zero": st.booleans(), "temperature": st.sampled_from([0.5, 0, "hot"])}
    )
    log_prob = st.sampled_from([1.0, -0.5, -3.25, 0.0])
    group = ScoredGroup(
        tokens=rows,
        masks=ragged(st.sampled_from([-100, -100, 1, 7])),
        scores=draw(st.lists(number, min_size=len(rows), max_size=len(rows))),
        inference_logprobs=maybe(lambda: ragged(log_prob)),
        ref_logprobs=maybe(lambda: ragged(log_prob)),
        advantages=maybe(lambda: ragged(number)),
        overrides=maybe(lambda: draw(st.lists(overrides, min_size=len(rows), max_size=len(rows)))),
        generation_params=draw(st.sampled_from([None, {}, {"temperature": 0.7}])),
        group_overrides=draw(st.sampled_from([None, {}, {"temperature": 1.5}])),
        images=draw(st.sampled_from([None, None, None, [], ["aGk="]])),
        distill_token_ids=draw(st.sampled_from([None, None, None, [], [[[1]]]])),
    )
    return stored(group)


def mapped(given_groups: list[Group], *, compares: bool = True) -> TrainingBatch:
    return to_batch(given_groups, vocab_size=VOCABULARY, max_tokens=LONGEST, compares=compares)


@dataclass
class Expected:
    """What becomes of one sequence, said slowly and once."""

    group: Group
    index: int
    fault: str | None  # the field for which it stays outside the model
    targets: list[int]  # tokens to train

    @property
    def response(self) -> range:
        return range(self.targets[0], len(self.group.tokens[self.index]))

    def values(self, field: str, unknown: float) -> list[float]:
        """The field on each token of the response; 0 off target, and where it is `unknown`."""
        given = getattr(self.group, field)
        known = [given[self.index][place] if given and place in self.targets else 0 for place in self.response]
        return [0 if value == unknown else float(value) for value in known]

    @property
    def temperature(self) -> float:
        rest = self.group.rest
        override = rest["overrides"][self.index] if rest.get("overrides") else {}
        for source in (override, rest.get("generation_params") or {}, rest.get("group_overrides") or {}):
            if source.get("temperature") in (0.5, 0.7, 1.5):
                return float(source["temperature"])
        return 1.0


def expected(given_groups: list[Group], *, compares: bool = True) -> tuple[list[Expected], list[tuple[str, int, str]]]:
    """Every sequence that has a score, in order; and gid, row and field of each that does not enter the model."""
    sequences, faults = [], []
    for group in given_groups:
        scored = [index for index, score in enumerate(group.scores) if math.isfinite(score)]
        for index, (ids, mask) in enumerate(zip(group.tokens, group.masks, strict=True)):
            found = Expected(group, index, None, [place for place in range(1, len(ids)) if mask[place] != -100])
            if index not in scored:
                found.fault = "scores"
            elif group.rest.get("images"):
                found.fault = "images"
            elif len(ids) > LONGEST or max(ids) >= VOCABULARY:
                found.fault = "tokens"
            elif group.advantages and not all(math.isfinite(value) for value in group.advantages[index]):
                found.fault = "advantages"
            elif group.rest.get("distill_token_ids"):
                found.fault = "distill_token_ids"
            elif not found.targets:
                found.fault = "masks"
            elif compares and len(scored) == 1 and not group.advantages:
                found.fault = "scores"
            if found.fault:
                faults.append((group.gid, index, found.fault))
            if index in scored:
                sequences.append(found)
    return sequences, faults


@given(groups(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_mapped_or_its_fault_is_named(these: list[Group], compares: bool) -> None:
    batch = mapped(these, compares=compares)
    sequences, faults = expected(these, compares=compares)
    assert sorted((one.gid, one.row, one.field) for one in batch.untrainable) == sorted(faults)
    assert batch.rows.tolist() == [row for row, one in enumerate(sequences) if not one.fault]
    assert batch.uids.tolist() == [one.group.gid for one in sequences]
    assert batch.scores.tolist() == [one.group.scores[one.index] for one in sequences]
    assert batch.group_sizes.tolist() == [np.isfinite(one.group.scores).sum() for one in sequences]
    assert batch.tokens == sum(len(ids) for group in these for ids in group.tokens)
    assert batch.unfit == sum(field != "masks" for _, _, field in faults)


@given(groups())
@settings(max_examples=100, deadline=None)
def test_sequences_enter_the_model_whole_and_train_exactly_their_targets(these: list[Group]) -> None:
    batch = mapped(these)
    columns = {name: column.unbind() for name, column in batch.model.items()}
    in_model = [one for one in expected(these)[0] if not one.fault]
    for place, (row, one) in enumerate(zip(batch.rows.tolist(), in_model, strict=True)):
        mine = {name: column[place].tolist() for name, column in columns.items()}
        tokens = one.group.tokens[one.index].tolist()
        mask = [int(place in one.targets) for place in one.response]
        assert mine["input_ids"] == mine["prompts"] + mine["responses"] == tokens
        assert mine["position_ids"] == list(range(len(tokens)))
        assert len(mine["prompts"]) == one.targets[0] >= 1
        assert mine["response_mask"] == mine["loss_mask"] == mask
        assert padded_row(batch.response_mask, row, one) == mask
    outside = batch.response_mask[[row for row, one in enumerate(expected(these)[0]) if one.fault]]
    assert outside.sum() == 0


def padded_row(values: torch.Tensor, row: int, one: Expected) -> list[float]:
    """The sequence's response; what is beyond it must be 0."""
    assert values[row, len(one.response) :].count_nonzero() == 0
    found: list[float] = values[row, : len(one.response)].tolist()
    return found


@given(groups())
@settings(max_examples=100, deadline=None)
def test_token_level_fields_stay_with_their_tokens(these: list[Group]) -> None:
    batch = mapped(these)
    for row, one in enumerate(expected(these)[0]):
        if one.fault:
            for values in (batch.rollout_known, batch.ref_known, batch.advantages_given):
                assert not values[row].any()
            continue
        for name, values, known in (
            ("inference_logprobs", batch.rollout_log_probs, batch.rollout_known),
            ("ref_logprobs", batch.ref_log_probs, batch.ref_known),
        ):
            assert padded_row(values, row, one) == one.values(name, unknown=1.0)
            given_rows = getattr(one.group, name)
            is_known = [place in one.targets and bool(given_rows) for place in one.response]
            is_known = [
                yes and given_rows[one.index][at] != 1.0 for yes, at in zip(is_known, one.response, strict=True)
            ]
            assert padded_row(known, row, one) == is_known
        assert padded_row(batch.advantages_given, row, one) == one.values("advantages", unknown=math.inf)


@given(groups())
@settings(max_examples=100, deadline=None)
def test_every_score_is_in_the_rewards_once_and_on_the_last_target(these: list[Group]) -> None:
    batch = mapped(these)
    for row, one in enumerate(expected(these)[0]):
        rewards = [0.0] * batch.response_mask.shape[1]
        rewards[0 if one.fault else one.targets[-1] - one.targets[0]] = float(np.float32(one.group.scores[one.index]))
        assert batch.token_level_rewards[row].tolist() == rewards


@given(groups())
@settings(max_examples=100, deadline=None)
def test_what_is_said_of_a_sequence_is_kept(these: list[Group]) -> None:
    batch, sequences = mapped(these), expected(these)[0]
    assert batch.is_given.tolist() == [bool(one.group.advantages) for one in sequences]
    overrides = [(one.group.rest.get("overrides") or {one.index: {}})[one.index] for one in sequences]
    assert batch.set_to_zero.tolist() == [bool(override.get("set_advantage_to_zero")) for override in overrides]
    wanted = [one.temperature for one in sequences if not one.fault]
    found = batch.temperature
    of_each = found.tolist() if isinstance(found, torch.Tensor) else [found] * len(wanted)
    assert of_each == pytest.approx(wanted)


@given(groups(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_batch_without_some_groups_is_the_batch_of_the_others(these: list[Group], data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(these), max_size=len(these)).filter(any))
    batch = mapped(these)
    gids = {group.gid for group, yes in zip(these, kept, strict=True) if yes}
    found = batch.only(torch.tensor([uid in gids for uid in batch.uids], dtype=torch.bool))
    others = mapped([group for group in these if group.gid in gids])
    assert found.rows.tolist() == others.rows.tolist()
    assert found.uids.tolist() == others.uids.tolist()
    width = others.response_mask.shape[1]
    for name in ("response_mask", "token_level_rewards", "rollout_log_probs", "ref_known", "advantages_given"):
        assert torch.equal(getattr(found, name)[:, :width], getattr(others, name)), name
    for name in others.model.keys():  # noqa: SIM118  # a TensorDict iterates over its rows
        assert torch.equal(found.model[name].values(), others.model[name].values()), name
        assert torch.equal(found.model[name].offsets(), others.model[name].offsets()), name


@given(groups())
@settings(max_examples=50, deadline=None)
def test_padded_and_jagged_are_inverse(these: list[Group]) -> None:
    batch = mapped(these)
    values = torch.rand(batch.response_mask.shape)
    assert torch.equal(batch.padded(batch.jagged(values * batch.response_mask)), values * batch.response_mask)
    assert torch.equal(batch.jagged(batch.response_mask).values(), batch.model["response_mask"].values())


candidates = st.lists(st.tuples(st.integers(0, 49), st.sampled_from([-0.5, -2.25, 0.0, 1.0])), max_size=3)


@given(st.lists(st.lists(candidates, min_size=2, max_size=5), min_size=2, max_size=4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_teachers_tokens_are_where_the_logits_are_that_predict_them(said: list[Any], one_without: bool) -> None:
    rows = [[7] * len(row) for row in said]
    group = ScoredGroup(
        tokens=rows,
        masks=[[-100, *row[1:]] for row in rows],
        scores=[1.0] * len(rows),
        distill_token_ids=[[[token for token, _ in place] for place in row] for row in said],
        distill_logprobs=[[[value for _, value in place] for place in row] for row in said],
    )
    others = [one()] if one_without else []
    batch = to_batch([stored(group), *others], vocab_size=50, max_tokens=9, distills=True)
    assert not batch.untrainable
    columns = zip(batch.model["teacher_ids"].unbind(), batch.model["teacher_logprobs"].unbind(), strict=True)
    known = [
        [
            [pair for pair in zip(*place, strict=True) if pair[1] > -1e3]
            for place in zip(*map(torch.Tensor.tolist, row), strict=True)
        ]
        for row in columns
    ]
    for row, places in zip(said, known, strict=False):
        expected_places = [[pair for pair in place if pair[1] <= 0] for place in row[1:]]
        assert places == [*expected_places, []]  # nothing comes after the last token
    assert known[len(said) :] == ([[[]] * 3] * 2 if one_without else [])


@pytest.mark.parametrize(
    ("ids", "log_probs", "field", "rule"),
    [
        ([[[], [1], [2]]], [[[], [-1.0], [-1.0]]], "distill_token_ids", "must be as long as its tokens, 3"),
        ([[[], [1]], [[], [1], [2]]], [[[], [-1.0]], [[], [-1.0], [-1.0]]], "distill_token_ids", "must be as long"),
        ([[[], [1], [2, 3]]] * 2, [[[], [-1.0], [-1.0]]] * 2, "distill_logprobs[2]", "must be one per token id, 2"),
        ([[[], [1], [50]]] * 2, [[[], [-1.0], [-1.0]]] * 2, "distill_token_ids[2]", "ids must be from 0 to 49"),
        ([[[], [1], [2]]] * 2, [[[], [math.nan], [-1.0]]] * 2, "distill_logprobs[1]", "must be finite"),
        ([[[], [1], [2]]] * 2, [], "distill_logprobs", "must be as long as its tokens, 3"),
    ],
)
def test_what_a_teacher_cannot_have_said_is_named(ids: Any, log_probs: Any, field: str, rule: str) -> None:
    group = one(distill_token_ids=ids, distill_logprobs=log_probs)
    reason = to_batch([group], vocab_size=50, max_tokens=9, distills=True).untrainable[0]
    assert reason.field == field
    assert rule in reason.rule


def test_an_environment_reads_what_is_wrong() -> None:
    batch = to_batch([one(tokens=[[5, 6, 7], [5, 6, 70]])], vocab_size=50, max_tokens=9)
    (reason,) = batch.untrainable
    assert str(reason).endswith("sequence 1: tokens = 70: ids must be from 0 to 49, the model's vocabulary")
    assert batch.rows.tolist() == [0]


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"masks": [[-100, 6, 7], [-100, 6]]}, [("masks", "2 values", "must be as long as its tokens, 3")]),
        ({"inference_logprobs": [[1.0, -1.0, -1.0]]}, [("inference_logprobs", "0 values", "must be as long")]),
        (
            {"ref_logprobs": [[1.0, -1.0, -math.inf], []]},
            [("ref_logprobs", -math.inf, "must be finite"), ("ref_logprobs", "0 values", "must be as long")],
        ),
        ({"scores": [1.0]}, [("scores", "1 values", "must have one per sequence, 2")] * 2),
        (
            {"scores": [math.inf, 1.0]},
            [("scores", math.inf, "must be finite"), ("scores", "1 sequence", "must have others")],
        ),
        (
            {"tokens": [[], [5, -6, 7]], "masks": [[], [-100, 6, 7]]},
            [("tokens", "0 tokens", "must have 1 to 9"), ("tokens", -6, "ids must be from 0")],
        ),
        ({"images": {"a": 1}}, [("images", "dict", "only text can be trained")] * 2),
        (
            {"distill_logprobs": [[[-1.0]]]},
            [("distill_logprobs", "1 values", "with distillation.enabled=true only")] * 2,
        ),
    ],
)
def test_whatever_is_stored_is_answered_for(fields: dict[str, Any], faults: list[tuple[str, Any, str]]) -> None:
    batch = to_batch([one(**fields)], vocab_size=50, max_tokens=9)
    in_order = sorted(batch.untrainable, key=lambda reason: reason.row)
    for reason, (field, value, rule) in zip(in_order, faults, strict=True):
        assert (reason.field, reason.value) == (field, value)
        assert rule in reason.rule
    assert len(batch.rows) == 2 - len(faults)


def one(**fields: Any) -> Group:
    rows = {"tokens": [[5, 6, 7]] * 2, "masks": [[-100, 6, 7]] * 2, "scores": [0.0, 1.0]}
    return stored(ScoredGroup(**{**rows, **fields}))


def test_the_samplers_log_probs_stand_in_for_those_that_were_not_sent() -> None:
    sampled = [np.array([1.0, -0.5, 1.0], "<f4"), np.array([1.0, -1.0, -2.0], "<f4")]
    silent, sent = one(), one(inference_logprobs=[[1.0, -3.0, -3.0]] * 2)
    silent.sampled_logprobs = sent.sampled_logprobs = sampled
    batch = mapped([silent, sent])
    assert batch.rollout_log_probs.tolist() == [[-0.5, 0.0], [-1.0, -2.0], [-3.0, -3.0], [-3.0, -3.0]]
    assert batch.rollout_known.tolist() == [[True, False], *[[True, True]] * 3]


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

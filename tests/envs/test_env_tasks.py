"""The arithmetic problems: what is held out, what is asked, what counts as right."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lachesis.broker.errors import ConfigurationError
from lachesis.envs.arithmetic.tasks import (
    KINDS,
    RECIPE,
    Arithmetic,
    is_held_out,
    larger,
    make_task,
    reversed_number,
    wrong_answer,
)
from lachesis.envs.registry import entry, names
from lachesis.envs.task import Problem

TASK = Arithmetic()
HELD_OUT = {problem.prompt for problem in TASK.held_out()}
problems = st.one_of(
    st.builds(larger, st.integers(0, 99), st.integers(0, 99)), st.builds(reversed_number, st.integers(0, 999))
)
seeds = st.integers(0, 2**31)


@settings(deadline=None)
@given(seeds)
def test_no_held_out_problem_is_trained_on(seed: int) -> None:
    assert not HELD_OUT & {problem.prompt for problem in islice(TASK.training(seed), 300)}


@settings(deadline=None)
@given(problems)
def test_a_problem_is_held_out_or_trained_on_but_never_both(problem: Problem) -> None:
    assert is_held_out(problem) == (problem.prompt in HELD_OUT)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(0, 99))
def test_the_order_of_two_numbers_moves_no_problem_across_the_split(a: int, b: int) -> None:
    assert is_held_out(larger(a, b)) == is_held_out(larger(b, a))


def test_a_tenth_is_held_out_and_every_kind_is_among_it() -> None:
    assert len(HELD_OUT) == len(TASK.held_out())
    assert 0.08 < len(HELD_OUT) / 11000 < 0.12
    assert {problem.kind for problem in TASK.held_out()[:20]} == set(KINDS)


@settings(deadline=None)
@given(seeds)
def test_the_stream_is_decided_by_its_seed(seed: int) -> None:
    first, again, other = (list(islice(TASK.training(number), 50)) for number in (seed, seed, seed + 1))
    assert first == again
    assert first != other
    assert {problem.kind for problem in islice(TASK.training(seed), 200)} == set(KINDS)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(0, 99))
def test_the_answer_of_max_is_the_larger_number(a: int, b: int) -> None:
    assert int(larger(a, b).answer) == max(a, b)


@settings(deadline=None)
@given(st.integers(0, 999))
def test_the_answer_of_rev_undoes_itself(number: int) -> None:
    assert reversed_number(int(reversed_number(number).answer)).answer == f"{number:03d}"


@settings(deadline=None)
@given(problems)
def test_the_prompt_ends_where_the_answer_begins(problem: Problem) -> None:
    assert problem.prompt.endswith("=")
    assert problem.prompt.count("=") == 1
    assert len(problem.prompt) + len(problem.answer) + 1 < RECIPE.max_token_len  # Atropos drops what is as long
    assert len(problem.answer) < TASK.max_new_tokens  # room for EOS, without which nothing is right


@settings(deadline=None)
@given(problems, st.text(max_size=6))
def test_only_the_exact_answer_scores(problem: Problem, text: str) -> None:
    assert TASK.score(problem, problem.answer) == 1.0
    assert TASK.score(problem, problem.answer + text) == float(text == "")
    assert TASK.score(problem, text) == float(text == problem.answer)


@settings(deadline=None)
@given(problems)
def test_the_mistake_of_the_warm_up_is_one_of_the_numbers_asked_about(problem: Problem) -> None:
    mistake = wrong_answer(problem)
    assert mistake in problem.prompt
    assert len(mistake) == len(problem.answer)


def test_the_groups_of_a_recipe_fill_its_batch() -> None:
    for name in names():
        recipe = entry(name).recipe()
        assert recipe.batch_size % recipe.group_size == 0
        assert recipe.max_token_len <= recipe.context_length


def test_a_file_of_problems_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"takes no file"):
        make_task("problems.jsonl")


def test_an_unknown_environment_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'chess': known ones are arithmetic, gsm8k"):
        entry("chess")

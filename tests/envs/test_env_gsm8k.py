"""GSM8K: what a file must hold, how it is split, and which answers are right."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from lachesis.broker.errors import ConfigurationError
from lachesis.envs.gsm8k.tasks import Gsm8k, make_task
from lachesis.envs.task import Problem


def row(number: int) -> dict[str, str]:
    return {"question": f"Ann has {number} eggs. How many has Ann?", "answer": f"Ann has {number}.\n#### {number:,}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(1000, 1040)))
    return path


@pytest.fixture
def task(file: Path) -> Gsm8k:
    return make_task(str(file))


def test_a_file_is_split_by_its_problems(file: Path, task: Gsm8k) -> None:
    held_out = {problem.prompt for problem in task.held_out()}
    trained = {problem.prompt for problem in islice(task.training(0), 200)}
    assert held_out
    assert not held_out & trained
    assert len(held_out) + len(trained) == 40
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert {problem.prompt for problem in make_task(str(file)).held_out()} == held_out


def test_the_seed_decides_the_order_and_every_problem_comes_once_a_pass(task: Gsm8k) -> None:
    once = 40 - len(task.held_out())
    first, again, other = (list(islice(task.training(seed), once)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    assert len(set(first)) == once


def test_the_answer_is_the_number_without_separators(task: Gsm8k) -> None:
    problem = next(task.training(0))
    assert problem.answer == "".join(digit for digit in problem.prompt if digit.isdigit())
    assert problem.answer not in problem.prompt.split("How many")[1]


RIGHT = [
    "She makes 9 * 2 = $18 a day.\n\n\\boxed{18}",
    "First \\boxed{17}, no: the ducks lay 16, so \\boxed{18}.",
    "\\[\n\\boxed{18}\n\\]\nI hope this helps, all 3 of you.",
    "\\boxed{18.00}",
    "\\boxed{\\$18}",
    "\\boxed{18 \\text{ dollars}}",
    "\\boxed{\\text{18}}",
    "\\boxed{\\frac{36}{2}}",
    "\\boxed{18\\,\\text{eggs}}",
    "The answer is 18.",
    "16 - 3 - 4 = 9, so 9 × 2 = **18**",
]
WRONG = [
    "",
    "I do not know.",
    "\\boxed{}",
    "\\boxed{19}",
    "\\boxed{18} is too little, so \\boxed{19}",
    "18, or rather \\boxed{-18}",
    "The answer is 18 of 20.",
    "\\boxed{18",
    "\\boxed{eighteen}",
    "\\boxed{x = 1}",
]


@pytest.mark.parametrize("text", RIGHT)
def test_the_right_number_scores_however_it_is_written(task: Gsm8k, text: str) -> None:
    assert task.score(Problem("gsm8k", "", "18"), text) == 1.0


@pytest.mark.parametrize("text", WRONG)
def test_another_number_or_none_scores_nothing(task: Gsm8k, text: str) -> None:
    assert task.score(Problem("gsm8k", "", "18"), text) == 0.0


@pytest.mark.parametrize("written", ["1200", "1,200", "1{,}200", "1\\!200", "\\$1,200", "1200.", "1{,}200.00"])
def test_separators_of_thousands_change_nothing(task: Gsm8k, written: str) -> None:
    assert task.score(Problem("gsm8k", "", "1200"), f"\\boxed{{{written}}}") == 1.0


@pytest.mark.parametrize(
    "written",
    ["9^{9^{9^{9}}}", "10^{10^{10}}", "99999999!", "\\binom{1000000000}{500000000}", "\\Gamma(10000000)", "9" * 6000],
)
@pytest.mark.parametrize("form", ["\\boxed{%s}", "$%s$", "%s"])
@pytest.mark.timeout(120)  # to compute one of these takes for ever
def test_no_answer_takes_long_to_grade(task: Gsm8k, written: str, form: str) -> None:
    assert task.score(Problem("gsm8k", "", "18"), form % written) == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "How many?"}', "needs `question`, and `answer` ending in"),
        ('{"question": "How many?", "answer": "three"}', "needs `question`, and `answer` ending in"),
        (json.dumps(row(1000)), "problems to train on"),
        ("not json", "line 1 is not JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        make_task(str(path))


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no such file"):
        make_task("nowhere.jsonl")

"""Held-out accuracy over plain HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from completion_server import TinyModel

from lachesis.envs.arithmetic.tasks import Arithmetic
from lachesis.envs.evaluate import EvaluationFailed, evaluate


def right_answers(tiny: TinyModel, wrong: set[str]) -> None:
    """Make the server know every answer but those to `wrong`."""
    answers = {problem.prompt: problem.answer for problem in Arithmetic().held_out()}

    def answer(prompt: str, body: dict[str, object]) -> str:
        assert body["temperature"] == 0.0
        return "no idea" if prompt in wrong else answers[prompt]

    tiny.answer = answer  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def restored(tiny: TinyModel) -> object:
    yield
    tiny.__dict__.pop("answer", None)


def test_each_answer_is_graded_against_its_own_problem(inference: str, tiny: TinyModel) -> None:
    held_out = Arithmetic().held_out()[:60]
    wrong = {problem.prompt for problem in held_out if problem.kind == "rev"}
    right_answers(tiny, wrong)
    result = evaluate(inference, "arithmetic", limit=60)
    assert result.n == 60
    assert result.per_kind == {"max": 1.0, "rev": 0.0}
    assert result.accuracy == 1 - len(wrong) / 60
    assert all(prompt in wrong and text == "no idea" for prompt, text, _ in result.examples)
    assert sorted(prompt for _, body in tiny.calls for prompt in body["prompt"]) == sorted(p.prompt for p in held_out)


def test_a_limit_beyond_the_held_out_problems_asks_each_once(inference: str, tiny: TinyModel) -> None:
    right_answers(tiny, set())
    result = evaluate(inference, "arithmetic", limit=10**6)
    assert result.accuracy == 1.0
    assert result.n == len(Arithmetic().held_out())


def test_a_token_in_the_address_is_sent_and_not_told(inference: str, tiny: TinyModel) -> None:
    right_answers(tiny, set())
    assert evaluate(inference.replace("://", "://x:lachesis_t@"), "arithmetic", limit=1).n == 1
    assert tiny.authorizations == {"Bearer lachesis_t"}
    with pytest.raises(EvaluationFailed) as failed:
        evaluate("http://x:lachesis_t@127.0.0.1:9", "arithmetic", limit=1)
    assert "lachesis_t" not in str(failed.value)


def test_a_chat_task_sends_messages(inference: str, tiny: TinyModel, tmp_path: Path) -> None:
    rows = [{"question": f"{number} and 1?", "answer": f"#### {number + 1}"} for number in range(40)]
    (tmp_path / "file.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny.answer = lambda prompt, body: f"\\boxed{{{int(prompt.split()[-3]) + 1}}}"  # type: ignore[method-assign]
    result = evaluate(inference, "gsm8k", data=str(tmp_path / "file.jsonl"))
    assert result.accuracy == 1.0
    assert result.n == len(tiny.calls) > 0
    assert {path for path, _ in tiny.calls} == {"chat/completions"}


def test_a_front_door_that_is_not_there_is_named() -> None:
    with pytest.raises(EvaluationFailed, match=r"front door at http://127\.0\.0\.1:9 gave no answer"):
        evaluate("http://127.0.0.1:9/", "arithmetic", limit=1)

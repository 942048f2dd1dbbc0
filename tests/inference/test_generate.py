"""What a front door reads from requests and answers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lachesis.inference.generate import (
    BadRequest,
    check_request,
    fault_of,
    is_single,
    prompt_key,
    read_answer,
    read_request,
)

VOCAB = 320


def generated(*, ids: list[int] | None = None, **meta: Any) -> bytes:
    answer: dict[str, Any] = {"text": "", "meta_info": {"finish_reason": {"type": "stop"}, **meta}}
    return msgspec.json.encode(answer if ids is None else answer | {"output_ids": ids})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input_ids": [1, VOCAB]}, "input_ids[1]"),
        ({"input_ids": [-1]}, "input_ids[0]"),
        ({"input_ids": [[1], [2, 9000]]}, "input_ids[1][1]"),
        ({"prompt": [9000]}, "prompt[0]"),
        ({"prompt": [[1], [9000]]}, "prompt[1][0]"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids[0]"),
        ({"sampling_params": {"stop_token_ids": [1, -2]}}, "sampling_params.stop_token_ids[1]"),
        ({"sampling_params": [{}, {"stop_token_ids": [VOCAB]}]}, "sampling_params.stop_token_ids[0]"),
        ({"top_logprobs_num": VOCAB + 1}, "top_logprobs_num"),
        ({"top_logprobs_num": [1, 5000]}, "top_logprobs_num"),
        ({"logprobs": 5000}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 5000}, "top_logprobs"),
    ],
)
def test_what_kills_a_server_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_request(body, VOCAB)
    assert refused.value.field == field


@given(ids=st.lists(st.integers(0, VOCAB - 1)))
def test_every_id_of_the_vocabulary_passes(ids: list[int]) -> None:
    check_request({"input_ids": ids, "sampling_params": {"stop_token_ids": ids}, "top_logprobs_num": VOCAB}, VOCAB)
    check_request({"prompt": [ids, "text"], "logprobs": True}, VOCAB)


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b'"x"', b"\xff"])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        read_request(raw)


def test_batches_are_told_from_single_prompts() -> None:
    singles: list[dict[str, Any]] = [{"text": "a"}, {"input_ids": [1, 2]}, {"prompt": [1, 2]}, {"messages": [{}]}]
    batches: list[dict[str, Any]] = [{"text": ["a"]}, {"input_ids": [[1]]}, {"prompt": ["a"]}, {"prompt": [[1]]}]

    assert all(map(is_single, singles))
    assert not any(map(is_single, batches))


def test_an_abort_and_a_null_log_prob_are_no_answers() -> None:
    def fault(raw: bytes) -> str | None:
        return fault_of(read_answer("/generate", raw))

    good = generated(output_token_logprobs=[[-0.5, 7, None]])
    assert fault(good) is None
    assert fault(generated(finish_reason={"type": "abort"})) == "aborted"
    assert fault(generated(output_token_logprobs=[[None, 0, None]])) == "null"
    assert fault(b"[" + good + b"," + generated(finish_reason="abort") + b"]") == "aborted"


def test_faults_of_completions() -> None:
    def fault(choice: dict[str, Any], *, echo: bool = False) -> str | None:
        return fault_of(read_answer("/v1/completions", msgspec.json.encode({"choices": [choice]})), echo=echo)

    assert fault({"finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0, -2.0]}}) is None
    assert fault({"finish_reason": "abort"}) == "aborted"
    assert fault({"finish_reason": "stop", "logprobs": {"token_logprobs": [None, -2.0]}}) == "null"
    assert fault({"finish_reason": "stop", "logprobs": {"token_logprobs": [None, -2.0]}}, echo=True) is None
    assert fault({"finish_reason": "stop", "logprobs": {"content": [{"logprob": None}]}}) == "null"


def test_prompts_with_one_beginning_have_one_key() -> None:
    head, words = list(range(128)), "w" * 512
    same: list[list[dict[str, Any]]] = [
        [{"input_ids": [*head, 1]}, {"input_ids": [*head, 2, 3]}, {"input_ids": [[*head, 4], [5]]}, {"prompt": head}],
        [{"text": words + "a"}, {"text": [words + "b", "c"]}, {"prompt": words}],
        [
            {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": content}]}
            for content in ("x", "y")
        ],
    ]
    keys = [{prompt_key(body) for body in bodies} for bodies in same]
    assert [len(found) for found in keys] == [1, 1, 1]
    assert len(set.union(*keys, {prompt_key({"input_ids": head[:-1]})})) == 4
    assert prompt_key({"input_ids": []}) is prompt_key({"text": None}) is prompt_key({}) is None

"""What a front door reads from requests and answers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lachesis.inference.gateway.protocols.sglang import (
    BadRequest,
    fault_of,
    is_single,
    prompt_key,
    read_answer,
    read_request,
)


def generated(*, ids: list[int] | None = None, **meta: Any) -> bytes:
    answer: dict[str, Any] = {"text": "", "meta_info": {"finish_reason": {"type": "stop"}, **meta}}
    return msgspec.json.encode(answer if ids is None else answer | {"output_ids": ids})


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

"""vLLM's requests as SGLang's, and SGLang's answers as vLLM's."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lachesis.inference.gateway.protocols.sglang import BadRequest, read_answer
from lachesis.inference.gateway.protocols.vllm import is_vllms, to_sglang, to_vllm


def test_what_atroposlib_sends() -> None:
    body = {
        "prompt": {"prompt_token_ids": [1, 2]}, "logprobs": 0, "n": 4, "max_tokens": 9, "temperature": 1.0, "stop": ["x"],
        "top_k": 0, "seed": None,
    }  # fmt: skip
    assert is_vllms("/generate", body)
    assert to_sglang(body) == {
        "input_ids": [1, 2],
        "return_logprob": True,
        "top_logprobs_num": 0,
        "sampling_params": {"max_new_tokens": 9, "n": 4, "temperature": 1.0, "stop": ["x"], "top_k": -1},
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", {"text": "hi"}),
        ([1, 2], {"input_ids": [1, 2]}),
        ({"prompt": "hi"}, {"text": "hi"}),
        ({"prompt_token_ids": [3]}, {"input_ids": [3]}),
    ],
)
def test_prompts(prompt: Any, expected: dict[str, Any]) -> None:
    assert to_sglang({"prompt": prompt}) == {"sampling_params": {"max_new_tokens": 16}, **expected}


def test_prompt_log_probs_ask_for_the_whole_prompt() -> None:
    asked = to_sglang({"prompt": [1], "prompt_logprobs": 5, "logprobs": 2})
    assert (asked["logprob_start_len"], asked["top_logprobs_num"], asked["return_logprob"]) == (0, 5, True)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"text": "hi"}}, "prompt"),
        ({"prompt": "hi", "stream": True}, "stream"),
    ],
)
def test_what_sglang_has_no_equal_for_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        to_sglang(body)
    assert refused.value.field == field


def test_answers() -> None:
    meta = {
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-0.5, 7, None], [-0.75, 8, None]],
        "output_top_logprobs": [[[-0.4, 6, None], [-0.5, 7, None]], [[-0.75, 8, None], [-2.0, 9, None]]],
        "input_token_logprobs": [[None, 1, None], [-3.0, 2, None]],
        "input_top_logprobs": [None, [[-0.1, 5, None], [-3.0, 2, None]]],
    }
    answer = read_answer("/generate", msgspec.json.encode({"text": "ab", "output_ids": [7, 8], "meta_info": meta}))

    def told(**body: Any) -> dict[str, Any]:
        return msgspec.json.decode(to_vllm({"prompt": {"prompt_token_ids": [1, 2]}, **body}, answer))

    common = {"text": ["ab"], "prompt": None, "token_ids": [[7, 8]], "finish_reasons": ["length"]}
    assert told() == common
    assert told(logprobs=0) == common | {"logprobs": [[[{"7": -0.5}], [{"8": -0.75}]]]}
    assert told(logprobs=2)["logprobs"] == [[[{"7": -0.5}, {"6": -0.4}], [{"8": -0.75}, {"9": -2.0}]]]
    assert told(prompt_logprobs=1)["prompt_logprobs"] == [None, {"2": -3.0, "5": -0.1}]

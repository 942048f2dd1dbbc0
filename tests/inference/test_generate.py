"""What a front door reads from requests and answers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lachesis.broker.codec import tokens_digest
from lachesis.inference.generate import (
    BadRequest,
    check_request,
    fault_of_completion,
    fault_of_generated,
    is_single,
    lineages,
    read_generated,
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
    good = generated(output_token_logprobs=[[-0.5, 7, None]])
    assert fault_of_generated(read_generated(good)) is None
    assert fault_of_generated(read_generated(generated(finish_reason={"type": "abort"}))) == "aborted"
    assert fault_of_generated(read_generated(generated(output_token_logprobs=[[None, 0, None]]))) == "null"
    several = b"[" + good + b"," + generated(finish_reason="abort") + b"]"
    assert fault_of_generated(read_generated(several)) == "aborted"


def test_faults_of_completions() -> None:
    def fault(choice: dict[str, Any], **body: Any) -> str | None:
        return fault_of_completion(msgspec.json.encode({"choices": [choice]}), body)

    assert fault({"finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0, -2.0]}}) is None
    assert fault({"finish_reason": "abort"}) == "aborted"
    assert fault({"finish_reason": "stop", "logprobs": {"token_logprobs": [None, -2.0]}}) == "null"
    assert fault({"finish_reason": "stop", "logprobs": {"token_logprobs": [None, -2.0]}}, echo=True) is None
    assert fault({"finish_reason": "stop", "logprobs": {"content": [{"logprob": None}]}}) == "null"


def test_lineage_is_kept_under_prompt_and_output() -> None:
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 3}]
    answer = read_generated(generated(ids=[7, 8, 9], weight_version="5", weight_versions=spans))

    [(digest, lineage)] = lineages({"input_ids": [1, 2]}, answer)

    assert digest == tokens_digest([1, 2, 7, 8, 9])
    assert (lineage.v_min, lineage.v_max, lineage.spans) == (3, 5, ((3, 0, 2), (5, 2, 3)))


def test_output_ids_are_found_in_the_log_probs_too() -> None:
    answer = read_generated(generated(weight_version="4", output_token_logprobs=[[-1.0, 7, None], [-1.0, 8, None]]))

    [(digest, lineage)] = lineages({"input_ids": [1]}, answer)

    assert digest == tokens_digest([1, 7, 8])
    assert lineage.spans == ((4, 0, 2),)


@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3), n=st.integers(1, 3)
)
def test_outputs_of_a_prompt_stand_together(prompts: list[list[int]], n: int) -> None:
    answer = [read_generated(generated(ids=[100 + index], weight_version="1"))[0] for index in range(len(prompts) * n)]

    digests = [digest for digest, _ in lineages({"input_ids": prompts}, answer)]

    assert digests == [tokens_digest([*prompts[index // n], 100 + index]) for index in range(len(prompts) * n)]


def test_without_ids_or_numbered_versions_there_is_no_lineage() -> None:
    assert lineages({"text": "hi"}, read_generated(generated(ids=[1], weight_version="1"))) == []
    assert lineages({"input_ids": [1]}, read_generated(generated(ids=[1], weight_version="default"))) == []
    assert lineages({"input_ids": [1]}, read_generated(generated(ids=[], weight_version="1"))) == []

"""What a front door reads of an answer's making, and how it hides that it asked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Lineage
from lachesis.broker.run.lineage import from_record, to_record
from lachesis.inference.gateway.lineage import Lineages, StreamLineage, lineages, to_ask, without
from lachesis.inference.gateway.protocols.sglang import read_answer

SPANS = [{"version": "3", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 3}]
LOGPROBS = [[-1.0, 7, None], [-0.5, 8, None], [-0.25, 9, None]]
MADE = Lineage(3, 5, ((3, 0, 2), (5, 2, 3)), np.array([-1.0, -0.5, -0.25], "<f4").tobytes())


def answer(**more: Any) -> dict[str, Any]:
    meta = {"finish_reason": {"type": "stop"}, "weight_version": "5", "weight_versions": SPANS, "completion_tokens": 3}
    return {"text": "abc", "output_ids": [7, 8, 9], "meta_info": {**meta, "output_token_logprobs": LOGPROBS, **more}}


def of_generate(body: dict[str, Any], told: Any) -> Lineages:
    return lineages(body, read_answer("/generate", msgspec.json.encode(told)))


def test_lineage_is_kept_under_prompt_and_output() -> None:
    assert of_generate({"input_ids": [1, 2]}, answer()) == [(tokens_digest([1, 2, 7, 8, 9]), MADE)]


def test_the_prompt_of_a_text_is_what_sglang_says() -> None:
    told = answer() | {"prompt_token_ids": [4]}
    assert of_generate({"text": "hi"}, [told, told])[1] == (tokens_digest([4, 7, 8, 9]), MADE)


def test_without_prompt_ids_or_numbered_versions_there_is_no_lineage() -> None:
    assert of_generate({"text": "hi"}, answer()) == []
    unnumbered = answer(weight_version="default", weight_versions=None)
    assert of_generate({"input_ids": [1]}, unnumbered) == []
    assert of_generate({"input_ids": [1]}, answer(output_token_logprobs=None) | {"output_ids": []}) == []


def test_a_stop_token_may_be_missing_in_the_output_ids() -> None:
    found = of_generate({"input_ids": [1]}, answer() | {"output_ids": [7, 8]})
    assert found == [
        (tokens_digest([1, 7, 8, 9]), MADE),
        (tokens_digest([1, 7, 8]), Lineage(3, 3, ((3, 0, 2),), MADE.log_probs[:8])),
    ]


def test_one_version_is_one_span_and_log_probs_may_be_missing() -> None:
    told = answer(weight_versions=None, output_token_logprobs=None)
    assert of_generate({"input_ids": [1]}, told) == [(tokens_digest([1, 7, 8, 9]), Lineage(5, 5, ((5, 0, 3),)))]


@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3), n=st.integers(1, 3)
)
def test_outputs_of_a_prompt_stand_together(prompts: list[list[int]], n: int) -> None:
    told = [
        answer(output_token_logprobs=None, weight_versions=None) | {"output_ids": [100 + index]}
        for index in range(len(prompts) * n)
    ]
    digests = [digest for digest, _ in of_generate({"input_ids": prompts}, told)]
    assert digests == [tokens_digest([*prompts[index // n], 100 + index]) for index in range(len(prompts) * n)]


def test_a_completion_tells_of_its_first_choice_and_a_chat_of_all() -> None:
    choice = {"finish_reason": "stop", "prompt_token_ids": [1], "logprobs": {"token_logprobs": [-1.0, -0.5, -0.25]}}
    told: dict[str, Any] = {"metadata": {"weight_version": "5", "weight_versions": SPANS}}
    told["choices"] = [choice | {"token_ids": [7, 8, 9]}, choice | {"token_ids": [6, 6, 6]}]
    assert lineages({}, read_answer("/v1/completions", msgspec.json.encode(told))) == [
        (tokens_digest([1, 7, 8, 9]), MADE)
    ]
    chosen = {
        "finish_reason": "stop",
        "prompt_token_ids": [1],
        "response_token_ids": [7, 8, 9],
        "meta_info": answer()["meta_info"],
    }
    told["choices"] = [chosen, chosen]
    found = lineages({}, read_answer("/v1/chat/completions", msgspec.json.encode(told)))
    assert found == [(tokens_digest([1, 7, 8, 9]), MADE)] * 2


# -- asking and hiding it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{"text": "a"}, {"input_ids": [1]}, {"text": "a", "return_logprob": True}])
def test_what_was_not_asked_for_is_not_handed_out(body: dict[str, Any]) -> None:
    asked = to_ask("/generate", body)
    plain = answer(output_token_logprobs=LOGPROBS if body.get("return_logprob") else None)
    if not body.get("return_logprob"):
        del plain["meta_info"]["output_token_logprobs"]
    more = answer(output_token_logprobs_length=3) if "return_logprob" in asked else answer()
    if "return_prompt_token_ids" in asked:
        more["prompt_token_ids"] = [4]
    assert ("return_prompt_token_ids" in asked) == ("text" in body)
    assert msgspec.json.decode(without("/generate", msgspec.json.encode(more), asked, body)) == plain
    assert to_ask("/generate", {**body, **asked}) == {}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_openai_routes_answer_as_if_nothing_had_been_added(path: str) -> None:
    asked = to_ask(path, {})
    added = {
        "logprobs": {"content": []},
        "token_ids": [1],
        "response_token_ids": [1],
        "prompt_token_ids": [1],
        "meta_info": {},
    }
    if "return_meta_info" not in asked:
        del added["meta_info"]
    plain: dict[str, Any] = {"choices": [{"text": "a", "logprobs": None}], "metadata": {"weight_version": "5"}}
    more = {**plain, "choices": [{**plain["choices"][0], **added}]}
    assert msgspec.json.decode(without(path, msgspec.json.encode(more), asked, {})) == plain
    assert to_ask(path, asked) == {}
    assert to_ask(path, {"stream": True}) == {}


def test_echo_gets_no_log_probs_because_sglang_refuses_both() -> None:
    assert "logprobs" not in to_ask("/v1/completions", {"echo": True})


# -- streams ------------------------------------------------------------------------------------------------------


def events(*told: Any) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(one) + b"\n\n" for one in told) + b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, 1200), max_size=5))
def test_a_stream_tells_at_its_end_however_it_is_cut(cuts: list[int]) -> None:
    raw = events(answer(finish_reason=None) | {"output_ids": [7]}, answer())
    edges = sorted({0, *(min(cut, len(raw)) for cut in cuts), len(raw)})
    stream, found = StreamLineage({"input_ids": [1, 2]}), []
    for start, end in pairwise(edges):
        found += stream.pass_on(raw[start:end])
    assert found == [(tokens_digest([1, 2, 7, 8, 9]), MADE)]


def test_several_generations_in_a_stream_are_told_apart() -> None:
    body = {"input_ids": [[1], [2]], "sampling_params": {"n": 2}}
    found = StreamLineage(body).pass_on(events(*(answer() | {"index": index} for index in (3, 0))))
    assert [digest for digest, _ in found] == [tokens_digest([2, 7, 8, 9]), tokens_digest([1, 7, 8, 9])]


@pytest.mark.parametrize(
    "told", [answer(finish_reason={"type": "abort"}), answer(completion_tokens=9), {"error": {"message": "no"}}]
)
def test_an_aborted_an_incremental_and_a_failed_stream_tell_nothing(told: Any) -> None:
    assert StreamLineage({"input_ids": [1]}).pass_on(events(told)) == []


@given(st.binary(max_size=64))
def test_records_survive(log_probs: bytes) -> None:
    lineage = Lineage(3, 5, ((3, 0, 2), (5, 2, 3)), log_probs)
    assert from_record(to_record(lineage)) == lineage

"""What may pass the front door: everything that Atropos and the OpenAI SDK send, and nothing that is not on the list."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from lachesis.inference.gateway.protocols.sglang import BadRequest, read_request
from lachesis.inference.gateway.request_check import RequestCheck, check_vocabulary
from lachesis.inference.gateway.request_fields import MOST_OUTPUTS, UNUSED

VOCAB = 320
ROUTES = GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
LEAST: dict[str, dict[str, Any]] = {
    GENERATE: {"input_ids": [1]},
    COMPLETIONS: {"prompt": "a"},
    CHAT: {"messages": MESSAGES},
}
check = RequestCheck()


def field_of(path: str, body: dict[str, Any], check: RequestCheck = check) -> str:
    """The field that is refused."""
    with pytest.raises(BadRequest) as refused:
        check(path, body)
    assert len(str(refused.value)) < 1000
    msgspec.json.encode([refused.value.field, refused.value.value, refused.value.rule])
    return str(refused.value.field)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {
            "input_ids": [1, 2], "return_logprob": True, "return_text_in_logprobs": False,
            "sampling_params": {
                "n": 4, "max_new_tokens": 32, "temperature": 1, "top_p": 1.0, "stop": ["User:", "</answer>"],
                "min_p": 0.0, "top_k": -1, "skip_special_tokens": False,
            },
        }),
        (GENERATE, {"prompt": {"prompt_token_ids": [1]}, "logprobs": 0, "n": 8, "max_tokens": 9, "stop": None, "top_k": 0}),
        (GENERATE, {"prompt": {"prompt_token_ids": [1]}, "prompt_logprobs": 4, "n": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 1}),
        (GENERATE, {"text": ["a", "b"], "sampling_params": [{"n": 1}, {}], "return_logprob": [True, False], "logprob_start_len": [0, -1]}),
        (GENERATE, {"input_ids": [[1], [2, 3]], "top_logprobs_num": [1, 2], "token_ids_logprob": [[1], [2]], "rid": "mine"}),
        (COMPLETIONS, {"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 5, "n": 2, "logprobs": 1, "echo": True}),
        (COMPLETIONS, {"model": "m", "prompt": ["a", ""], "seed": None, "stream": True, "stream_options": {"include_usage": True}}),
        (CHAT, {"model": "m", "messages": MESSAGES, "max_tokens": 1, "n": 2, "temperature": 0.7, "stop": ["a"]}),
        (CHAT, {"messages": MESSAGES, "reasoning": {"enabled": True, "effort": "high", "max_tokens": 9}}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tool_choice": "auto", "tools": [
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
        ]}),
        (CHAT, {"messages": [*MESSAGES, {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ]}, {"role": "tool", "tool_call_id": "1", "content": "2"}], "response_format": {"type": "json_object"}}),
    ],
)  # fmt: skip
def test_what_clients_send_passes_as_it_came(path: str, body: dict[str, Any]) -> None:
    assert check(path, body) == body


def _sdk(module: Any) -> set[str]:
    """Every field that the OpenAI SDK's typed methods send."""
    base = module.CompletionCreateParamsBase
    streaming = module.CompletionCreateParamsStreaming
    return set(inspect.get_annotations(base)) | set(inspect.get_annotations(streaming))


@pytest.mark.parametrize(("path", "module"), [(COMPLETIONS, completion_params), (CHAT, chat_params)])
def test_every_field_of_the_openai_sdk_is_taken_or_left_out(path: str, module: Any) -> None:
    for name in _sdk(module) - LEAST[path].keys():
        value = {"n": 1, "parallel_tool_calls": False}.get(name)
        assert (name in check(path, LEAST[path] | {name: value})) is (name not in UNUSED), name


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "name",
    [
        "image_data", "audio_data", "video_data", "lora_path", "custom_logit_processor", "bootstrap_host", "bootstrap_room",
        "http_worker_ipc", "session_params", "data_parallel_rank", "routed_dp_rank", "return_hidden_states", "input_embeds",
        "priority", "kv_hints", "encoder_urls", "stop_regex", "custom_params", "beam_width", "is_normalized", "x" * 5000,
        "x` - at `$.input_ids[7]", "\n", "",
    ],
)  # fmt: skip
def test_other_fields_are_refused_and_can_be_passed(path: str, name: str) -> None:
    assert field_of(path, LEAST[path] | {name: 1}).startswith(name[:50])
    inside = {"input_ids": [1], "sampling_params": {name: [[1] * 5000]}}
    assert field_of(GENERATE, inside).startswith(f"sampling_params.{name[:50]}")
    if name.isidentifier():
        lenient = RequestCheck([name])
        assert lenient(path, LEAST[path] | {name: 1}) == LEAST[path] | {name: 1}
        assert lenient(GENERATE, inside) == inside


IDS = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (GENERATE, {}, "input_ids"),
        (GENERATE, {"text": "a", "input_ids": [1]}, "input_ids"),
        (GENERATE, {"input_ids": []}, "input_ids"),
        (GENERATE, {"input_ids": [[]]}, "input_ids[0]"),
        (GENERATE, {"input_ids": [[1], []]}, "input_ids[1]"),
        (GENERATE, {"input_ids": [[1], 2]}, "input_ids[1]"),
        (GENERATE, {"input_ids": [1, [2]]}, "input_ids[1]"),
        (GENERATE, {"input_ids": [1.0]}, "input_ids[0]"),
        (GENERATE, {"input_ids": [True]}, "input_ids[0]"),
        (GENERATE, {"input_ids": ["1"]}, "input_ids[0]"),
        (GENERATE, {"input_ids": [2**70]}, "input_ids[0]"),
        (GENERATE, {"input_ids": 1}, "input_ids"),
        (GENERATE, {"text": [1]}, "text[0]"),
        (GENERATE, {"text": []}, "text"),
        (GENERATE, IDS | {"sampling_params": []}, "sampling_params"),
        (GENERATE, IDS | {"sampling_params": "x"}, "sampling_params"),
        (GENERATE, IDS | {"sampling_params": {"max_new_tokens": 2.5}}, "sampling_params.max_new_tokens"),
        (GENERATE, IDS | {"sampling_params": {"max_new_tokens": -5}}, "sampling_params.max_new_tokens"),
        (GENERATE, IDS | {"sampling_params": {"n": 0}}, "sampling_params.n"),
        (GENERATE, IDS | {"sampling_params": {"n": 257}}, "sampling_params.n"),
        (GENERATE, IDS | {"sampling_params": {"n": None}}, "sampling_params.n"),
        (GENERATE, {"input_ids": [[1]] * 5, "sampling_params": {"n": 256}}, "sampling_params.n"),
        (GENERATE, {"input_ids": [[1]] * (MOST_OUTPUTS + 1)}, "input_ids"),
        (GENERATE, IDS | {"sampling_params": {"stop": ["x"] * 33}}, "sampling_params.stop"),
        (GENERATE, IDS | {"sampling_params": {"stop_token_ids": ["5000"]}}, "sampling_params.stop_token_ids[0]"),
        (GENERATE, IDS | {"sampling_params": {"logit_bias": {"-1": 1}}}, "sampling_params.logit_bias"),
        (GENERATE, IDS | {"sampling_params": {"logit_bias": {"1": 101}}}, "sampling_params.logit_bias"),
        (GENERATE, IDS | {"logprob_start_len": -7}, "logprob_start_len"),
        (GENERATE, IDS | {"logprob_start_len": 4}, "logprob_start_len"),
        (GENERATE, IDS | {"logprob_start_len": [0]}, "logprob_start_len"),
        (GENERATE, {"input_ids": [[1], [2]], "logprob_start_len": [0]}, "logprob_start_len"),
        (GENERATE, IDS | {"top_logprobs_num": 1e6}, "top_logprobs_num"),
        (GENERATE, IDS | {"top_logprobs_num": 129}, "top_logprobs_num"),
        (GENERATE, {"input_ids": [1] * 20_000, "logprob_start_len": 0, "top_logprobs_num": 128}, "top_logprobs_num"),
        (GENERATE, IDS | {"token_ids_logprob": [-1]}, "token_ids_logprob[0]"),
        (GENERATE, IDS | {"token_ids_logprob": [[1]]}, "token_ids_logprob"),
        (GENERATE, IDS | {"token_ids_logprob": 5}, "token_ids_logprob"),
        (GENERATE, {"prompt": [1, "a"]}, "prompt[1]"),
        (GENERATE, {"prompt": [1], "max_tokens": 2.5}, "max_tokens"),
        (GENERATE, {"prompt": [1], "logprobs": -1}, "logprobs"),
        (GENERATE, {"prompt": [1], "prompt_logprobs": True}, "prompt_logprobs"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": [5, 400.0]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x"),
        (COMPLETIONS, {"prompt": ["a" * 9000] * 9, "echo": True, "logprobs": 50}, "logprobs"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": "1000000"}, "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///a"}}]}]},
         "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0].type"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_of_its_kind_is_refused(path: str, body: dict[str, Any], field: str) -> None:
    assert field_of(path, body) == field


def test_a_kind_of_media_passes_where_it_is_named() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}
    assert RequestCheck(["image_url"])(CHAT, body) == body


def test_an_error_shows_as_much_of_a_value_as_fits_into_a_line() -> None:
    with pytest.raises(BadRequest, match=r"^sampling_params\.temperature = 'xxxx.*: must be float") as refused:
        check(GENERATE, IDS | {"sampling_params": {"temperature": "x" * 1_000_000}})
    assert len(str(refused.value.value)) < 200
    huge = read_request(b'{"input_ids": [' + b"9" * 4000 + b"]}")
    assert field_of(GENERATE, huge) == "input_ids[0]"


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
        ({"token_ids_logprob": [[VOCAB]]}, "token_ids_logprob[0][0]"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"top_logprobs_num": VOCAB + 1}, "top_logprobs_num"),
        ({"top_logprobs_num": [1, 5000]}, "top_logprobs_num"),
        ({"logprobs": 5000}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 5000}, "top_logprobs"),
    ],
)
def test_what_the_vocabulary_does_not_have_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_vocabulary(body, VOCAB)
    assert refused.value.field == field


@given(ids=st.lists(st.integers(0, VOCAB - 1)))
def test_every_id_of_the_vocabulary_passes(ids: list[int]) -> None:
    check_vocabulary({"input_ids": ids, "sampling_params": {"stop_token_ids": ids}, "top_logprobs_num": VOCAB}, VOCAB)
    check_vocabulary({"prompt": [ids, ids], "logprobs": True}, VOCAB)

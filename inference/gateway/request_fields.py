"""What the front door's routes take: each field that may reach SGLang, with its type and range. Others are refused.

SGLang believes what it is told. It opens the files and URLs it is given, its scheduler dies of numbers that it did not
expect, with all that runs on it, and what is large stops it for everybody. So this is a list of what may pass, of which
each field has been tried at its edges against a real server (tests/attack/test_front_door_fields.py).
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from msgspec import Meta, Struct

MOST_OUTPUTS = 1024  # prompts × n of one request
MOST_LOG_PROBS = 1 << 21  # of the prompt: its tokens × the alternatives that are asked for at each
PARTS = frozenset(
    {"text", "thinking", "reasoning", "tool_reference"}
)  # of messages; of others SGLang opens what they name

# OpenAI's fields that SGLang has no use for. Clients send them to anybody, so they are left out, as SGLang does.
UNUSED = frozenset({
    "audio", "best_of", "function_call", "functions", "metadata", "modalities", "moderation", "prediction",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store",
    "user", "verbosity", "web_search_options",
})  # fmt: skip

Tokens: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Limit: TypeAlias = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=256)]
Top: TypeAlias = Annotated[int, Meta(ge=0, le=128)]
Start: TypeAlias = Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)]
Share: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Text: TypeAlias = Annotated[str, Meta(max_length=1024)]
Stop: TypeAlias = Text | Annotated[list[Text], Meta(max_length=32)]
TokenIds: TypeAlias = Annotated[list[TokenId], Meta(max_length=1024)]
Bias: TypeAlias = Annotated[
    dict[Annotated[str, Meta(pattern=r"^[0-9]{1,9}\Z")], Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=4096)
]
Grammar: TypeAlias = Annotated[str, Meta(max_length=32_768)]
Prompt: TypeAlias = Annotated[list[TokenId], Meta(min_length=1)]
Prompts: TypeAlias = Annotated[list[Prompt], Meta(min_length=1, max_length=MOST_OUTPUTS)]
Texts: TypeAlias = Annotated[list[str], Meta(min_length=1, max_length=MOST_OUTPUTS)]
Switch: TypeAlias = bool | None
Name: TypeAlias = Text | Annotated[list[Text], Meta(max_length=MOST_OUTPUTS)] | None


class _Sampling(Struct, forbid_unknown_fields=True):
    """What every route takes, all under the same names."""

    n: Count = 1
    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 30)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=2)] | None = None  # a logit divided by less is no number
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: Switch = None
    skip_special_tokens: Switch = None
    logit_bias: Bias | None = None


class Native(_Sampling):
    """`sampling_params` of SGLang's /generate."""

    max_new_tokens: Tokens | None = None
    min_new_tokens: Tokens | None = None
    sampling_seed: int | None = None
    spaces_between_special_tokens: Switch = None
    no_stop_trim: Switch = None
    regex: Grammar | None = None
    json_schema: Grammar | None = None
    ebnf: Grammar | None = None


class Generate(Struct, forbid_unknown_fields=True):
    """SGLang's /generate. Of a batch most fields may be lists, a value for each prompt."""

    text: Any = None  # which prompts it and input_ids may be: see request_check.py
    input_ids: Any = None
    sampling_params: Native | list[Native] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: Start | list[Start] | None = None
    top_logprobs_num: Top | list[Top] | None = None
    token_ids_logprob: Any = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    stream: bool = False
    rid: Any = None  # replaced by one of ours
    extra_key: Name = None
    cache_salt: Name = None


class VLLM(_Sampling):
    """/generate in vLLM's shape."""

    prompt: Any = None
    max_tokens: Tokens | None = None
    min_tokens: Tokens | None = None
    seed: int | None = None
    logprobs: Top | None = None
    prompt_logprobs: Top | None = None
    include_stop_str_in_output: Switch = None
    spaces_between_special_tokens: Switch = None
    n: Count | None = None  # type: ignore[assignment]
    stream: Switch = None
    model: Text | None = None
    request_id: Any = None


class _StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: Switch = None
    continuous_usage_stats: Switch = None
    include_obfuscation: Switch = None


class _OpenAI(_Sampling):
    """What OpenAI's two routes take, in OpenAI's words, and SGLang's besides."""

    model: Text | None = None
    seed: int | None = None
    stream: Switch = None
    stream_options: _StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    regex: Grammar | None = None
    ebnf: Grammar | None = None
    min_tokens: Tokens = 0
    no_stop_trim: bool = False
    return_token_ids: bool = False
    rid: Any = None
    extra_key: Name = None
    cache_salt: Name = None


class Completion(_OpenAI):
    prompt: Any = None
    max_tokens: Limit | None = None
    logprobs: Top | None = None
    echo: Switch = None
    suffix: str | None = None
    json_schema: Grammar | None = None


class Message(Struct):
    """What else is in it is handed to nobody: SGLang reads the fields that it knows."""

    role: Text
    content: str | list[dict[str, Any]] | None = None


class Chat(_OpenAI, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    input_ids: Prompt | None = None  # in the place of what the messages would be
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: Switch = None
    top_logprobs: Top | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Text | Annotated[float, Meta(ge=0, le=1)] | None = None
    reasoning: dict[str, Any] | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=32)] | None = None
    return_meta_info: bool = False
    return_prompt_token_ids: bool = False
    return_input_ids_in_sglext: bool = False
    return_output_ids_in_sglext: bool = False

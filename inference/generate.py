"""Requests to SGLang and its answers, as far as a front door has to understand them.

A few values kill an SGLang server with everything that runs on it, so they are refused before they reach one. And an
answer may say 200 and still be none: cut off by an abort, or made by broken weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from lachesis.broker.codec import tokens_digest
from lachesis.broker.errors import LachesisError
from lachesis.broker.records import Lineage


class BadRequest(LachesisError, ValueError):
    """A request no server could take. Names the field, the offending value and the rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field} = {value!r}: {rule}")


class _Span(Struct):
    version: str
    start: int
    end: int


class _Meta(Struct):
    finish_reason: Any = None
    weight_version: str | None = None
    weight_versions: list[_Span] | None = None
    output_token_logprobs: list[tuple[float | None, int, Any]] | None = None


class Generated(Struct):
    """One generation in the answer to /generate."""

    meta_info: _Meta = msgspec.field(default_factory=_Meta)
    output_ids: list[int] | None = None


class _ChatToken(Struct):
    logprob: float | None = None


class _Logprobs(Struct):
    content: list[_ChatToken] | None = None  # of a chat completion
    token_logprobs: list[float | None] | None = None  # of a completion


class _Choice(Struct):
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(Struct):
    choices: list[_Choice] = []


_generated = msgspec.json.Decoder(Generated | list[Generated])
_completion = msgspec.json.Decoder(_Completion)
_request = msgspec.json.Decoder(dict[str, Any])


def read_request(raw: bytes) -> dict[str, Any]:
    """Raises BadRequest unless the body is a JSON object."""
    try:
        return _request.decode(raw)
    except msgspec.DecodeError as error:
        raise BadRequest("body", raw[:40].decode(errors="replace"), f"must be a JSON object: {error}") from None


def check_request(body: Mapping[str, Any], vocab_size: int) -> None:
    """Raise BadRequest for what would kill a server whose token ids are below `vocab_size`."""
    for name in ("input_ids", "prompt"):
        _check_ids(name, body.get(name), vocab_size)
    sampling = body.get("sampling_params")
    samplings: Sequence[Any] = sampling if isinstance(sampling, list) else [sampling]
    for fields, prefix in ((body, ""), *((each, "sampling_params.") for each in samplings)):
        if isinstance(fields, dict):
            _check_ids(f"{prefix}stop_token_ids", fields.get("stop_token_ids"), vocab_size)
    for name in ("top_logprobs_num", "top_logprobs", "logprobs"):
        value = body.get(name)
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and count > vocab_size:
                raise BadRequest(name, count, f"must not exceed the vocabulary's {vocab_size} tokens")


def _check_ids(name: str, value: Any, vocab_size: int) -> None:
    if not isinstance(value, list):
        return
    for index, each in enumerate(value):
        if isinstance(each, list):
            _check_ids(f"{name}[{index}]", each, vocab_size)
        elif isinstance(each, int) and not 0 <= each < vocab_size:
            raise BadRequest(f"{name}[{index}]", each, f"token ids go from 0 to {vocab_size - 1}")


def is_single(body: Mapping[str, Any]) -> bool:
    """Whether the request holds one prompt rather than a batch of them."""
    for name in ("text", "prompt", "input_ids"):
        value = body.get(name)
        if isinstance(value, list) and (name == "text" or (value and isinstance(value[0], list | str))):
            return False
    return True


def read_generated(raw: bytes) -> list[Generated]:
    """The generations in an answer to /generate. Raises msgspec.DecodeError if it is not SGLang's."""
    answer = _generated.decode(raw)
    return answer if isinstance(answer, list) else [answer]


def fault_of_generated(answer: Sequence[Generated]) -> str | None:
    """`aborted` or `null` where the generations are not what was asked for."""
    for each in answer:
        reason = each.meta_info.finish_reason
        if (reason.get("type") if isinstance(reason, dict) else reason) == "abort":
            return "aborted"
    for each in answer:
        if any(token[0] is None for token in each.meta_info.output_token_logprobs or ()):
            return "null"
    return None


def fault_of_completion(raw: bytes, body: Mapping[str, Any]) -> str | None:
    """The same for an answer of the OpenAI routes; with `echo` the first log-prob is null by right."""
    choices = _completion.decode(raw).choices
    if any(choice.finish_reason == "abort" for choice in choices):
        return "aborted"
    for choice in choices:
        if choice.logprobs is None:
            continue
        values = [token.logprob for token in choice.logprobs.content or ()]
        values += (choice.logprobs.token_logprobs or [])[1 if body.get("echo") else 0 :]
        if None in values:
            return "null"
    return None


def lineages(body: Mapping[str, Any], answer: Sequence[Generated]) -> list[tuple[str, Lineage]]:
    """(digest of prompt and output ids, versions) of each generation; none where the request held text."""
    ids = body.get("input_ids")
    if not isinstance(ids, list) or not ids or not answer:
        return []
    prompts = ids if isinstance(ids[0], list) else [ids]
    each_prompt = max(1, len(answer) // len(prompts))  # n outputs of a prompt stand together
    return list(_lineages(prompts, each_prompt, answer))


def _lineages(
    prompts: Sequence[list[int]], each_prompt: int, answer: Sequence[Generated]
) -> Iterator[tuple[str, Lineage]]:
    for index, generated in enumerate(answer):
        meta = generated.meta_info
        output = generated.output_ids
        if output is None:
            output = [token for _, token, _ in meta.output_token_logprobs or ()]
        spans = meta.weight_versions or [_Span(meta.weight_version or "", 0, len(output))]
        if not output or not all(span.version.isdecimal() for span in spans):
            continue
        versions = [int(span.version) for span in spans]
        lineage = Lineage(
            v_min=min(versions),
            v_max=max(versions),
            spans=tuple((version, span.start, span.end) for version, span in zip(versions, spans, strict=True)),
        )
        yield tokens_digest(prompts[index // each_prompt] + output), lineage

"""Checks requests before they reach a server: fields, types and ranges, and what these mean together."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, convert

from lachesis.inference.gateway.protocols.sglang import BadRequest
from lachesis.inference.gateway.protocols.vllm import is_vllms
from lachesis.inference.gateway.request_fields import (
    MOST_LOG_PROBS,
    MOST_OUTPUTS,
    PARTS,
    UNUSED,
    VLLM,
    Chat,
    Completion,
    Generate,
    Prompt,
    Prompts,
    Texts,
    TokenIds,
)

_ROUTES: Mapping[str, type[Struct]] = {
    "/generate": Generate,
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
}
_BY_PROMPT = ("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "extra_key", "cache_salt")
_IDS = ("input_ids", "prompt", "token_ids_logprob")
_COUNTS = ("top_logprobs_num", "top_logprobs", "logprobs")  # of alternatives
_MESSAGE = re.compile(r"(.*?)(?: - at (?:`key` in )?`\$([\w.\[\]]*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (contains unknown|missing required) field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")


class RequestCheck:
    """Fields and parts of messages whose names are in `passed` are passed on unseen."""

    def __init__(self, passed: Collection[str] = ()) -> None:
        self._passed = frozenset(passed)
        self._unused, self._parts = UNUSED - self._passed, PARTS | self._passed

    def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The request as it may be sent. Raises BadRequest."""
        if path != "/generate" and not self._unused.isdisjoint(body):
            body = {name: value for name, value in body.items() if name not in self._unused}
        kind = VLLM if is_vllms(path, body) else _ROUTES[path]
        asked = _converted(self._seen(body) if self._passed else body, kind)
        if isinstance(asked, Generate):
            self._native(asked)
        elif isinstance(asked, Chat):
            self._chat(asked)
        elif isinstance(asked, Completion):
            _completion(asked)
        elif isinstance(asked, VLLM):
            _vllm(asked)
        return body

    def _seen(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        seen = {name: value for name, value in fields.items() if name not in self._passed}
        sampling = seen.get("sampling_params")
        if isinstance(sampling, dict):
            seen["sampling_params"] = self._seen(sampling)
        elif isinstance(sampling, list):
            seen["sampling_params"] = [self._seen(each) if isinstance(each, dict) else each for each in sampling]
        return seen

    def _native(self, asked: Generate) -> None:
        if asked.text is None and asked.input_ids is None and "input_embeds" in self._passed:
            return
        if (asked.text is None) == (asked.input_ids is None):
            raise BadRequest("input_ids", asked.input_ids, "a request has either text or input_ids")
        name = "text" if asked.input_ids is None else "input_ids"
        prompts, many = _prompts(name, getattr(asked, name))
        for field in _BY_PROMPT:
            each = getattr(asked, field)
            if isinstance(each, list) and not (many and len(each) == len(prompts)):
                raise BadRequest(field, each, "a list has one value for each prompt of a list of prompts")
        if (ids := asked.token_ids_logprob) is not None:
            nested = isinstance(ids, list) and any(isinstance(each, list) for each in ids)
            if nested and not (many and len(ids) == len(prompts)):
                raise BadRequest(
                    "token_ids_logprob", ids, "a list of lists has one for each prompt of a list of prompts"
                )
            _converted(ids, list[TokenIds] if nested else TokenIds | None, "token_ids_logprob")
        samplings = asked.sampling_params if isinstance(asked.sampling_params, list) else [asked.sampling_params]
        _bound_outputs(len(prompts), max(each.n if each else 1 for each in samplings), "sampling_params.n")
        if asked.logprob_start_len is not None:
            entries = _log_probs_of_prompts(asked, prompts)
            _bound_log_probs("top_logprobs_num", asked.top_logprobs_num, entries)

    def _chat(self, asked: Chat) -> None:
        for index, message in enumerate(asked.messages):
            for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if not isinstance(kind := part.get("type"), str) or kind not in self._parts:
                    where = f"messages[{index}].content[{place}].type"
                    raise BadRequest(where, kind, f"must be one of {', '.join(sorted(self._parts))}")


def _completion(asked: Completion) -> None:
    prompts, _ = _prompts("prompt", asked.prompt)
    _bound_outputs(len(prompts), asked.n, "n")
    if asked.echo:
        _bound_log_probs("logprobs", asked.logprobs, (asked.logprobs or 0) * sum(map(len, prompts)))


def _vllm(asked: VLLM) -> None:
    prompt = asked.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, list):  # else vllm.py looks at it
        _converted(prompt, Prompt, "prompt")
    if asked.prompt_logprobs and isinstance(prompt, str | list):
        _bound_log_probs("prompt_logprobs", asked.prompt_logprobs, asked.prompt_logprobs * len(prompt))


def _prompts(name: str, value: Any) -> tuple[Sequence[Any], bool]:
    """(the prompts, whether they came as a list of them). `prompt` may be what text may be, or input_ids."""
    first = value[0] if isinstance(value, list) and value else None
    if name != "text" and isinstance(first, list):
        return _converted(value, Prompts, name), True
    if name == "input_ids" or (name == "prompt" and isinstance(first, int)):
        return [_converted(value, Prompt, name)], False
    found = _converted(value, str | Texts, name)
    return ([found], False) if isinstance(found, str) else (found, True)


def _bound_outputs(prompts: int, n: int, field: str) -> None:
    if prompts * n > MOST_OUTPUTS:
        raise BadRequest(field, n, f"{prompts} prompts with {n} outputs each are more than {MOST_OUTPUTS} outputs")


def _log_probs_of_prompts(asked: Generate, prompts: Sequence[Any]) -> int:
    """How many alternatives are asked for at the tokens of the prompts; of a text at most one token a character."""
    starts, tops, entries = asked.logprob_start_len, asked.top_logprobs_num or 0, 0
    for index, prompt in enumerate(prompts):
        start = starts[index] if isinstance(starts, list) else starts or 0
        if not isinstance(prompt, str) and start > len(prompt):
            raise BadRequest("logprob_start_len", start, f"must be from -1 to the prompt's length, {len(prompt)}")
        if 0 <= start < len(prompt):
            entries += (len(prompt) - start) * (tops[index] if isinstance(tops, list) else tops)
    return entries


def _bound_log_probs(field: str, value: Any, entries: int) -> None:
    if entries > MOST_LOG_PROBS:
        raise BadRequest(
            field, value, f"these are {entries} alternatives at the tokens of the prompts, more than {MOST_LOG_PROBS}"
        )


# -- the vocabulary -------------------------------------------------------------------------------------------------


def check_vocabulary(body: Mapping[str, Any], vocab_size: int) -> None:
    """Raise BadRequest for what only a larger vocabulary than that of `vocab_size` tokens has."""
    for name in _IDS:
        if name in body:
            _check_ids(name, body[name], vocab_size)
    sampling = body.get("sampling_params")
    samplings: Sequence[Any] = sampling if isinstance(sampling, list) else [sampling]
    for fields, prefix in ((body, ""), *((each, "sampling_params.") for each in samplings)):
        if isinstance(fields, dict):
            _check_ids(f"{prefix}stop_token_ids", fields.get("stop_token_ids"), vocab_size)
            bias = fields.get("logit_bias")
            for token in bias if isinstance(bias, dict) else ():
                if token.isdecimal() and int(token) >= vocab_size:
                    raise BadRequest(f"{prefix}logit_bias", token, _rule(vocab_size))
    for name in _COUNTS:
        value = body.get(name)
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and count > vocab_size:
                raise BadRequest(name, count, f"must not exceed the vocabulary's {vocab_size} tokens")


def _rule(vocab_size: int) -> str:
    return f"token ids go from 0 to {vocab_size - 1}"


def _check_ids(name: str, value: Any, vocab_size: int) -> None:
    if isinstance(value, list) and value and not isinstance(value[0], str):
        one, many = _below(vocab_size)
        try:
            convert(value, many if isinstance(value[0], list) else one)
        except msgspec.ValidationError as error:
            raise _refusal(name, value, str(error), _rule(vocab_size)) from None


@lru_cache(maxsize=16)
def _below(vocab_size: int) -> tuple[Any, Any]:
    ids = list[Annotated[int, Meta(ge=0, le=vocab_size - 1)]]
    return ids, list[ids]


# -- msgspec's words in ours ----------------------------------------------------------------------------------------


def _converted(value: Any, kind: Any, name: str = "") -> Any:
    try:
        return convert(value, kind)
    except msgspec.ValidationError as error:
        raise _refusal(name, value, str(error)) from None


def _refusal(name: str, value: Any, message: str, rule: str = "") -> BadRequest:
    """What the message says of the field it speaks of, whose name and value are looked up in `value`."""
    found = _MESSAGE.fullmatch(message)
    said, path = (found[1], found[2] or "") if found else (message, "")
    try:
        for field, index in _STEP.findall(path):
            value = value[field] if field else value[int(index)]
        name += path.removesuffix("[...]")
    except (LookupError, TypeError):  # an unknown field's name may look like a path
        said = message
    if named := _NAMED.fullmatch(said):
        name, value = f"{name}.{named[2]}", value.get(named[2]) if isinstance(value, dict) else None
        unknown = "is not taken here; the front door's --pass-fields NAME lets a field through"
        said = unknown if named[1] == "contains unknown" else "is missing"
    said = said.replace("`", "").replace("Expected ", "must be ").replace(", got ", ", not ")
    return BadRequest(name.lstrip("."), value, rule or said[:1].lower() + said[1:])

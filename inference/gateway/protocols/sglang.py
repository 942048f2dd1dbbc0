"""Requests to SGLang and its answers, as far as a front door has to understand them.

An answer may say 200 and still be none: cut off by an abort, or made by broken weights.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any
from zlib import crc32

import msgspec
from msgspec import Struct, field

from lachesis.broker.errors import LachesisError

KEY_TOKENS = 128  # of a prompt decide which server has its beginning in its cache
KEY_CHARACTERS = 512
SHOWN = 120  # characters of a value in an error

_FIRST = itemgetter(0)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = SHOWN
_SHORT.maxlevel = 2


class BadRequest(LachesisError, ValueError):
    """A request no server could take. Names the field, the offending value and the rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field, self.rule = _shown(field), rule
        self.value = value if value is None or isinstance(value, bool | float) else _shown(value)
        super().__init__(f"{self.field} = {_SHORT.repr(value)}: {rule}")


def _shown(value: Any) -> Any:
    """The value itself where it is short enough for an error."""
    if isinstance(value, int) and abs(value) < 1 << 63:
        return value
    if isinstance(value, str):
        return value if len(value) <= SHOWN else value[:SHOWN] + "…"
    return _SHORT.repr(value)


class Span(Struct):
    """SGLang's label: output tokens start to end - 1 were made by this version of the weights."""

    version: str
    start: int
    end: int


class Meta(Struct, gc=False):
    finish_reason: Any = None  # {"type": …}; null in a stream until its last piece
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None  # of the prompt; None where SGLang does not say
    weight_version: str | None = None
    weight_versions: list[Span] | None = None
    output_token_logprobs: list[tuple[float | None, int, Any]] | None = None
    output_top_logprobs: Any = None
    input_token_logprobs: Any = None
    input_top_logprobs: Any = None


class Generated(Struct):
    """One generation in an answer, whichever route it came from."""

    text: str = ""
    meta_info: Meta = field(default_factory=Meta)
    output_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    index: int = 0  # of a stream's piece: which of its generations this is

    @property
    def finish(self) -> str | None:
        reason = self.meta_info.finish_reason
        return reason.get("type") if isinstance(reason, dict) else reason

    @property
    def log_probs(self) -> list[float | None]:
        """Of the output tokens, in nats; empty if they were not asked for."""
        return list(map(_FIRST, self.meta_info.output_token_logprobs or ()))


class _ChatToken(Struct):
    logprob: float | None = None


class _Logprobs(Struct):
    content: list[_ChatToken] | None = None  # of a chat completion
    token_logprobs: list[float | None] | None = None  # of a completion


class _Choice(Struct):
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    meta_info: Meta | None = None  # of a chat completion
    token_ids: list[int] | None = None  # of a completion
    response_token_ids: list[int] | None = None  # of a chat completion
    prompt_token_ids: list[int] | None = None


class _Metadata(Struct):
    weight_version: str | None = None
    weight_versions: list[Span] | None = None


class _Completion(Struct):
    choices: list[_Choice] = []
    metadata: _Metadata | None = None  # of the first choice


_generated = msgspec.json.Decoder(Generated | list[Generated])
_completion = msgspec.json.Decoder(_Completion)
_request = msgspec.json.Decoder(dict[str, Any])


def read_request(raw: bytes) -> dict[str, Any]:
    """Raises BadRequest unless the body is a JSON object."""
    try:
        return _request.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest("body", raw[:40].decode(errors="replace"), f"must be a JSON object: {error}") from None


def prompt_key(body: Mapping[str, Any]) -> int | None:
    """What prompts with the same beginning have in common, in every front door; None where there is no prompt."""
    for name in ("input_ids", "text", "prompt", "messages"):
        value = body.get(name)
        while name != "messages" and isinstance(value, list) and value and not isinstance(value[0], int):
            value = value[0]  # of a batch, the first prompt
        if not value:
            continue
        if isinstance(value, list) and name != "messages":
            beginning = msgspec.json.encode(value[:KEY_TOKENS])
        else:
            beginning = (value if isinstance(value, str) else msgspec.json.encode(value).decode())[
                :KEY_CHARACTERS
            ].encode()
        return crc32(beginning)
    return None


def is_single(body: Mapping[str, Any]) -> bool:
    """Whether the request holds one prompt rather than a batch of them."""
    for name in ("text", "prompt", "input_ids"):
        value = body.get(name)
        if isinstance(value, list) and (name == "text" or (value and isinstance(value[0], list | str))):
            return False
    return True


def read_answer(path: str, raw: bytes) -> list[Generated]:
    """The generations in a complete answer. Raises msgspec.DecodeError if it is not SGLang's."""
    if path != "/generate":
        return list(_of_choices(_completion.decode(raw)))
    answer = _generated.decode(raw)
    return answer if isinstance(answer, list) else [answer]


def _of_choices(answer: _Completion) -> Iterator[Generated]:
    """An answer of the OpenAI routes says only of its first choice, or in `meta_info`, which versions made it."""
    for index, choice in enumerate(answer.choices):
        meta = choice.meta_info or Meta()
        if choice.meta_info is None and answer.metadata is not None and index == 0:
            meta.weight_version, meta.weight_versions = answer.metadata.weight_version, answer.metadata.weight_versions
        output = choice.response_token_ids if choice.token_ids is None else choice.token_ids
        if meta.output_token_logprobs is None and choice.logprobs is not None:
            values = choice.logprobs.token_logprobs
            if values is None:
                values = [token.logprob for token in choice.logprobs.content or ()]
            ids = output if output is not None and len(output) == len(values) else [-1] * len(values)
            meta.output_token_logprobs = [(value, token, None) for value, token in zip(values, ids, strict=True)]
        meta.finish_reason = choice.finish_reason
        yield Generated("", meta, output, choice.prompt_token_ids, index)


def fault_of(answer: Sequence[Generated], *, echo: bool = False) -> str | None:
    """`aborted` or `null` where the generations are not what was asked for; with `echo` the first is null by right."""
    if any(each.finish == "abort" for each in answer):
        return "aborted"
    return "null" if any(None in each.log_probs[int(echo) :] for each in answer) else None

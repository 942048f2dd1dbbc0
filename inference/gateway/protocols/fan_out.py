"""A completion of several prompts or outputs, as calls of one output each.

SGLang says of a completion's first output alone which versions made it. So the outputs are asked for one by one, at
the same time, and put together as if one answer had held them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

MOST_OUTPUTS = 256  # outputs; more go to a server as they came, and only the first is recorded


def singles(path: str, body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """(calls, how many of them a prompt has; these stand together). No calls unless it is a completion of several."""
    if path != "/v1/completions":
        return [], 1
    prompt, n = body.get("prompt"), body.get("n")
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str) else [prompt]
    n = n if type(n) is int and n > 0 else 1  # SGLang refuses what is no number
    if not 1 < len(prompts) * n <= MOST_OUTPUTS:
        return [], 1
    return [{**body, "prompt": each, "n": 1} for each in prompts for _ in range(n)], n


def merge(answers: Sequence[bytes], n: int) -> bytes:
    """One answer of single ones, n to a prompt."""
    told = [msgspec.json.decode(answer) for answer in answers]
    whole = told[0]
    whole["choices"] = [{**each["choices"][0], "index": index} for index, each in enumerate(told)]
    if whole.get("usage"):
        whole["usage"] = _usage([each["usage"] for each in told], n)
    return msgspec.json.encode(whole)


def _usage(each: Sequence[Mapping[str, Any]], n: int) -> dict[str, Any]:
    """As SGLang counts: the tokens of every output, and of every prompt once."""
    made = {
        name: sum(usage[name] or 0 for usage in each)
        for name in ("completion_tokens", "reasoning_tokens")
        if name in each[0]
    }
    prompt = sum(usage["prompt_tokens"] for usage in each[::n])
    cached = [usage.get("prompt_tokens_details") for usage in each[::n]]
    if details := next(filter(None, cached), None):
        details["cached_tokens"] = sum(one["cached_tokens"] for one in cached if one)
    return {
        **each[0], **made, "prompt_tokens": prompt, "total_tokens": prompt + made["completion_tokens"],
        "prompt_tokens_details": details,
    }  # fmt: skip

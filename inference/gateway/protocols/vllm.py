"""`/generate` in vLLM's request shape, as atroposlib's vllm server sends it: told by its key `prompt`.

Its parameters are turned into SGLang's, and SGLang's answer into vLLM's. What SGLang has no equal for is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from lachesis.inference.gateway.protocols.sglang import BadRequest, Generated

MAX_TOKENS = 16  # vLLM's default
_RENAMED = {
    "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
}  # fmt: skip
_OURS = ("prompt", "logprobs", "prompt_logprobs", "stream", "model", "request_id")


def is_vllms(path: str, body: Mapping[str, Any]) -> bool:
    return path == "/generate" and "prompt" in body


def to_sglang(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request for SGLang; its fields are checked already (request_check.py). Raises BadRequest."""
    if body.get("stream"):
        raise BadRequest("stream", True, "vLLM's shape is answered as a whole; SGLang's and OpenAI's may be streamed")
    sampling: dict[str, Any] = {"max_new_tokens": MAX_TOKENS}
    for name, value in body.items():
        if name in _OURS or value is None:
            continue
        sampling[_RENAMED.get(name, name)] = value
    if sampling.get("top_k") == 0:
        sampling["top_k"] = -1  # both mean: no limit
    request: dict[str, Any] = {"sampling_params": sampling, **_prompt(body["prompt"])}
    top, prompt_top = body.get("logprobs"), body.get("prompt_logprobs")
    if top is not None or prompt_top is not None:
        request |= {"return_logprob": True, "top_logprobs_num": max(top or 0, prompt_top or 0)}
    if prompt_top is not None:
        request["logprob_start_len"] = 0
    return request


def _prompt(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return {"input_ids": prompt}
    raise BadRequest("prompt", prompt, 'must be text, token ids, {"prompt": text} or {"prompt_token_ids": [ids]}')


def to_vllm(body: Mapping[str, Any], answer: Sequence[Generated]) -> bytes:
    """SGLang's answer in vLLM's shape: lists over the n outputs."""
    prompt = body["prompt"]
    told: dict[str, Any] = {
        "text": [each.text for each in answer],
        "prompt": prompt.get("prompt") if isinstance(prompt, dict) else prompt,
        "token_ids": [each.output_ids or [] for each in answer],
        "finish_reasons": [each.finish for each in answer],
    }
    if (top := body.get("logprobs")) is not None:
        told["logprobs"] = [
            list(_positions(each.meta_info.output_token_logprobs, each.meta_info.output_top_logprobs, top))
            for each in answer
        ]
    if (top := body.get("prompt_logprobs")) is not None:
        meta = answer[0].meta_info  # all outputs have the one prompt
        found = _positions(meta.input_token_logprobs, meta.input_top_logprobs, top)
        told["prompt_logprobs"] = [
            None if index == 0 else {token: value for entry in position for token, value in entry.items()}
            for index, position in enumerate(found)
        ]
    return msgspec.json.encode(told)


def _positions(tokens: Any, tops: Any, top: int) -> Iterator[list[dict[int, float | None]]]:
    """Per position: the token itself, then the most likely others."""
    for index, token in enumerate(tokens or ()):
        others = tops[index] if top and tops and index < len(tops) else None
        yield [{token[1]: token[0]}, *({other[1]: other[0]} for other in (others or ())[:top] if other[1] != token[1])]

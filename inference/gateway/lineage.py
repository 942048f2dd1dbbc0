"""Which versions made an answer: what to ask SGLang for besides what the client asked, and what to make of it.

A generation is known by its prompt ids and output ids. SGLang tells them in every answer that is no stream; of a
stream only where the request has the prompt's ids, and on the OpenAI routes as openai_stream.py says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import msgspec
import numpy as np

from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Lineage
from lachesis.inference.gateway.protocols.sglang import Generated, Span, read_answer

Lineages = list[tuple[str, Lineage]]
_ID = itemgetter(1)  # of (log-prob, token id, text)
_OPEN = (b'"finish_reason":null', b'"finish_reason": null')  # in a piece of a stream that goes on


def to_ask(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to a request, so that its answer can be recorded."""
    if body.get("stream"):
        return {}
    asked: dict[str, Any] = {}
    if path == "/generate":
        if not body.get("return_logprob"):
            asked["return_logprob"] = True
        if not body.get("input_ids") and not body.get("return_prompt_token_ids"):
            asked["return_prompt_token_ids"] = True
        return asked
    if not body.get("return_token_ids"):
        asked["return_token_ids"] = True
    if path == "/v1/completions":
        if body.get("logprobs") is None and not body.get("echo"):
            asked["logprobs"] = 0
        return asked
    if not body.get("logprobs"):
        asked["logprobs"] = True
    if not body.get("return_meta_info"):
        asked["return_meta_info"] = True
    return asked


def without(path: str, content: bytes, asked: Mapping[str, Any], body: Mapping[str, Any]) -> bytes:
    """The answer as it would be had nothing been added to the request."""
    if not asked:
        return content
    answer = msgspec.json.decode(content)
    if path == "/generate":
        for each in answer if isinstance(answer, list) else [answer]:
            if "return_prompt_token_ids" in asked:
                each.pop("prompt_token_ids", None)
            if "return_logprob" in asked:
                each["meta_info"] = {key: value for key, value in each["meta_info"].items() if "logprobs" not in key}
        return msgspec.json.encode(answer)
    for choice in answer["choices"]:
        if "logprobs" in asked:
            choice["logprobs"] = None
        if "return_meta_info" in asked:
            choice.pop("meta_info", None)
        if "return_token_ids" in asked:
            for name in ("token_ids", "response_token_ids"):
                choice.pop(name, None)
            if not body.get("return_prompt_token_ids"):
                choice.pop("prompt_token_ids", None)
    return msgspec.json.encode(answer)


def lineages(body: Mapping[str, Any], answer: Sequence[Generated]) -> Lineages:
    """(digest of prompt and output ids, lineage) of each generation of a complete answer that tells them."""
    prompts = _prompts(body)
    each_prompt = max(1, len(answer) // len(prompts)) if prompts else 1  # n outputs of a prompt stand together
    found: Lineages = []
    for index, generated in enumerate(answer):
        prompt = prompts[index // each_prompt] if prompts else generated.prompt_token_ids
        if prompt:
            found += _lineages(prompt, generated)
    return found


class StreamLineage:
    """Reads the lineage off a stream of /generate while it passes."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._prompts = _prompts(body)
        sampling = body.get("sampling_params")
        self._each_prompt = int(sampling.get("n") or 1) if isinstance(sampling, dict) else 1
        self._rest = b""

    def pass_on(self, piece: bytes) -> Lineages:
        """What is known once this piece has come: the lineage of the generations that it ends."""
        *events, self._rest = (self._rest + piece).split(b"\n\n")
        found: Lineages = []
        for event in events:
            if not event.startswith(b"data: {") or any(mark in event for mark in _OPEN):
                continue
            try:
                generated = read_answer("/generate", event[6:])[0]
            except msgspec.DecodeError:  # an error, or another server's stream: it tells nothing
                continue
            place = generated.index // self._each_prompt
            prompt = self._prompts[place] if place < len(self._prompts) else generated.prompt_token_ids
            whole = len(generated.output_ids or ()) == generated.meta_info.completion_tokens
            if prompt and whole and generated.finish not in (None, "abort"):
                found += _lineages(prompt, generated)
        return found


def _prompts(body: Mapping[str, Any]) -> list[list[int]]:
    ids = body.get("input_ids")
    if not isinstance(ids, list) or not ids:
        return []
    return ids if isinstance(ids[0], list) else [ids]


def _lineages(prompt: list[int], generated: Generated) -> Iterator[tuple[str, Lineage]]:
    meta = generated.meta_info
    tokens = meta.output_token_logprobs or []
    outputs = [list(map(_ID, tokens))] if tokens and tokens[0][1] >= 0 else []
    if generated.output_ids and generated.output_ids not in outputs:
        outputs.append(generated.output_ids)  # a stop token may be in one and not in the other
    log_probs = np.array(generated.log_probs, dtype="<f4") if tokens else None
    for output in outputs:
        spans = meta.weight_versions or [Span(meta.weight_version or "", 0, len(output))]
        if not all(span.version.isdecimal() for span in spans):
            continue
        clipped = tuple(
            (int(span.version), span.start, min(span.end, len(output))) for span in spans if span.start < len(output)
        )
        versions = [version for version, _, _ in clipped]
        known = b"" if log_probs is None or len(log_probs) < len(output) else log_probs[: len(output)].tobytes()
        yield tokens_digest(prompt + output), Lineage(min(versions), max(versions), clipped, known)

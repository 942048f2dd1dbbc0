"""What a stream of an OpenAI route tells of its outputs: their ids, if SGLang is asked for them, but no versions.

Whoever passes the stream on asks the server which version it serves, before and after: if that is the same, and
versions only grow, it made all of the output, because a server is paused from a load until it names the new version.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct, field

from lachesis.inference.gateway.protocols.sglang import Generated, Meta

CHATS_IDS = ("return_input_ids_in_sglext", "return_output_ids_in_sglext")  # come in a piece of their own, at the end


class _Output(Struct):
    """One output as far as it has come."""

    prompt: list[int] = []
    ids: list[int] = field(default_factory=list)
    log_probs: list[float | None] = field(default_factory=list)
    finish: str | None = None


class OpenAIStream:
    """Reads the stream, and takes out what the client did not ask for. `asked` goes into the request."""

    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        names = ("return_token_ids",) if path == "/v1/completions" else CHATS_IDS
        self.asked = {name: True for name in names if not body.get(name)}
        self._outputs: defaultdict[int, _Output] = defaultdict(_Output)
        self._rest = b""

    def pass_on(self, piece: bytes) -> tuple[bytes, list[Generated]]:
        """What to send of it, in whole events, and the outputs whose ids are complete with it."""
        *events, self._rest = (self._rest + piece).split(b"\n\n")
        sent: list[bytes] = []
        complete: list[Generated] = []
        for event in events:
            chunk = _chunk(event)
            complete += self._read(chunk)
            if not self._strip(chunk):
                sent += (event, b"\n\n")
            elif chunk.get("choices") or chunk.get("sglext"):
                sent += (b"data: ", msgspec.json.encode(chunk), b"\n\n")
        return b"".join(sent), complete

    def _read(self, chunk: Mapping[str, Any]) -> Iterator[Generated]:
        for choice in chunk.get("choices") or ():
            output = self._outputs[choice.get("index", 0)]
            output.prompt = choice.get("prompt_token_ids") or output.prompt
            output.ids += choice.get("token_ids") or ()
            output.log_probs += _log_probs(choice.get("logprobs") or {})
            output.finish = choice.get("finish_reason") or output.finish
            if choice.get("finish_reason") and output.ids:
                yield from _generated(output)
        told = chunk.get("sglext") or {}
        for index, ids in enumerate(told.get("output_ids") or ()):
            output = self._outputs[index]
            output.prompt, output.ids = told.get("input_ids") or [], ids
            yield from _generated(output)

    def _strip(self, chunk: dict[str, Any]) -> bool:
        """Whether anything was in it that the client did not ask for."""
        found = False
        if "return_token_ids" in self.asked:
            for choice in chunk.get("choices") or ():
                for name in ("token_ids", "prompt_token_ids"):
                    found |= choice.pop(name, None) is not None
        for name, key in zip(CHATS_IDS, ("input_ids", "output_ids"), strict=True):
            if name in self.asked and chunk.get("sglext"):
                found |= chunk["sglext"].pop(key, None) is not None
        return found


def _chunk(event: bytes) -> dict[str, Any]:
    """What an event holds; nothing if it is no chunk, or another server's."""
    if not event.startswith(b"data: {"):
        return {}
    try:
        chunk: dict[str, Any] = msgspec.json.decode(event[6:])
    except msgspec.DecodeError:
        return {}
    return chunk


def _generated(output: _Output) -> Iterator[Generated]:
    if output.finish == "abort" or not output.prompt:
        return
    meta = Meta(finish_reason=output.finish)
    if len(output.log_probs) == len(output.ids) and None not in output.log_probs:
        meta.output_token_logprobs = [
            (value, token, None) for value, token in zip(output.log_probs, output.ids, strict=True)
        ]
    yield Generated("", meta, output.ids, output.prompt)


def _log_probs(told: Mapping[str, Any]) -> list[float | None]:
    if "token_logprobs" in told:
        return list(told["token_logprobs"])
    return [token["logprob"] for token in told.get("content") or ()]

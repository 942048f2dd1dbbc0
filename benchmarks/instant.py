"""A server that answers a generation at once, and a client that asks without pause: what is left is the front door's."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvloop

PROMPT, OUTPUT, VOCABULARY = 256, 256, 128_000  # tokens


def answer() -> bytes:
    """What SGLang says of 256 output tokens with log-probs, as a complete HTTP response."""
    rng = np.random.default_rng(0)
    output = rng.integers(0, VOCABULARY, OUTPUT).tolist()
    log_probs = (-rng.exponential(0.5, OUTPUT)).astype("f4").astype(float).tolist()
    meta: dict[str, Any] = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": OUTPUT},
        "prompt_tokens": PROMPT,
        "weight_version": "8",
        "total_retractions": 0,
        "weight_versions": [
            {"version": "7", "start": 0, "end": 100},
            {"version": "8", "start": 100, "end": OUTPUT},
        ],
        "input_token_logprobs": [],
        "output_token_logprobs": [[value, token, None] for value, token in zip(log_probs, output, strict=True)],
        "completion_tokens": OUTPUT,
        "cached_tokens": 0,
        "e2e_latency": 1.0,
    }
    body = json.dumps({"text": "some word " * OUTPUT, "output_ids": output, "meta_info": meta}, separators=(",", ":"))
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        len(body),
        body.encode(),
    )


def question(number: int) -> bytes:
    """A request as atroposlib's sglang server sends it, less the address; every number has another prompt."""
    prompt = np.random.default_rng(number).integers(0, VOCABULARY, PROMPT).tolist()
    sampling = {"n": 1, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": OUTPUT}
    asked = {"sampling_params": sampling, "return_logprob": True, "return_text_in_logprobs": False}
    body = json.dumps({"input_ids": prompt, **asked}).encode()
    return (
        b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        % (
            len(body),
            body,
        )
    )


class _Instant(asyncio.Protocol):
    """Reads requests, answers each with the same bytes."""

    canned = answer()
    other = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 19\r\n\r\n{"model_path": "m"}'

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            self._data = self._data[end + 4 + length :]
            self._transport.write(self.canned if head.startswith(b"post") else self.other)


async def _serve(told: Any) -> None:
    server = await asyncio.get_running_loop().create_server(_Instant, "127.0.0.1", 0)
    told.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _run(told: Any) -> None:
    uvloop.run(_serve(told))


@contextmanager
def instant_server() -> Iterator[str]:
    """The URL of such a server, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=_run, args=(told,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{told.get()}"
    finally:
        process.kill()
        process.join()


async def ask(port: int, questions: list[bytes], clients: int) -> list[float]:
    """Send the questions over `clients` connections, one after the other on each; seconds until each answer."""
    left, spent = iter(questions), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for asked in left:
            began = time.perf_counter()
            writer.write(asked)
            head = await reader.readuntil(b"\r\n\r\n")
            status, _, fields = head.partition(b"\r\n")
            length = int(fields.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            body = await reader.readexactly(length)
            if b" 200 " not in status:
                raise SystemExit(f"{status.decode()}: {body[:500]!r}")
            spent.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return spent

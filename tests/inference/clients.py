"""Clients of a front door that generate without pause."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import msgspec
import numpy as np
from published import VOCAB

CLIENTS = 16


def request(tokens: int = 48) -> dict[str, Any]:
    prompt = np.random.default_rng().integers(5, VOCAB, size=8).tolist()
    sampling = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}


async def generate(client: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[int, Any]:
    async with client.post("/generate", json=body) as response:
        return response.status, await response.json()


async def stream(client: aiohttp.ClientSession, url: str, tokens: int) -> AsyncIterator[dict[str, Any]]:
    """The pieces of a streamed answer of one server; once there is one, the request runs."""
    async with client.post(f"{url}/generate", json=request(tokens) | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            piece = line.removeprefix(b"data:").strip()
            if piece and piece != b"[DONE]":
                yield msgspec.json.decode(piece)


class Load:
    """`done` holds (request, status, answer) of each call; `repeated` counts connections that broke."""

    def __init__(self) -> None:
        self.done: list[tuple[dict[str, Any], int, Any]] = []
        self.repeated = 0

    def failures(self) -> list[tuple[int, Any]]:
        return [(status, answer) for _, status, answer in self.done if status != 200]

    def by_version(self) -> Counter[str]:
        return Counter(answer["meta_info"]["weight_version"] for _, _, answer in self.done)

    async def more(self, calls: int = CLIENTS) -> None:
        """Wait until so many more calls are done."""
        seen = len(self.done)
        while len(self.done) < seen + calls:  # noqa: ASYNC110
            await anyio.sleep(0.02)


@asynccontextmanager
async def load(client: aiohttp.ClientSession, *, repeat: bool = False) -> AsyncIterator[Load]:
    """Clients at work inside the block; at its end they finish what they have begun.

    With `repeat` they send a call again, as environments do, whose connection broke; else that fails the test.
    """
    load, stop = Load(), False

    async def work() -> None:
        while not stop:
            body = request()
            try:
                load.done.append((body, *await generate(client, body)))
            except aiohttp.ClientError:
                if not repeat:
                    raise
                load.repeated += 1
                await anyio.sleep(0.1)

    workers = [asyncio.create_task(work()) for _ in range(CLIENTS)]
    try:
        yield load
    finally:
        stop = True
        await asyncio.gather(*workers)

"""Prompts of which servers die, as a queue has poison messages: refused for a while, before they take the rest down."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

REFUSED_S = 60.0
MOST_PROMPTS = 10_000  # prompts; the oldest are forgotten first
_PROMPT = ("input_ids", "text", "prompt", "messages")


class Poison:
    """Remembers prompts by their hash. Time comes in as an argument, in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}  # oldest first

    def add(self, body: Mapping[str, Any], now: float) -> None:
        digest = _digest(body)
        self._until.pop(digest, None)
        self._until[digest] = now + REFUSED_S
        if len(self._until) > MOST_PROMPTS:
            del self._until[next(iter(self._until))]

    def refuses(self, body: Mapping[str, Any], now: float) -> bool:
        while self._until and (oldest := next(iter(self._until.items())))[1] <= now:
            del self._until[oldest[0]]
        return bool(self._until) and _digest(body) in self._until


def _digest(body: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(msgspec.json.encode([body.get(name) for name in _PROMPT]), digest_size=16).digest()

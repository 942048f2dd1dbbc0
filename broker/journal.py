"""Two logs people read: `metrics` (one entry per step, update, evaluation) and `control` (who did what, when).

They are logs, not state: trimmed. An entry stands once, also where the client had to send it twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import uuid4

from lachesis.broker.connection import Redis, wait_for_entries
from lachesis.broker.keys import Keys
from lachesis.broker.lua import Scripts

KEEP = 100_000  # entries, approximately
SLICE = 500  # entries read at a time
ONCE_S = 300  # a command is not sent again after so long


class Journal:
    def __init__(self, redis: Redis, blocking: Redis, scripts: Scripts, keys: Keys) -> None:
        self._redis, self._blocking, self._scripts, self._keys = redis, blocking, scripts, keys

    async def metric(self, kind: str, values: Mapping[str, object]) -> None:
        """Append one entry of `kind`: step | shadow (a step of one) | update | eval | example."""
        fields = {"kind": kind, **{key: f"{v:.6g}" if isinstance(v, float) else str(v) for key, v in values.items()}}
        await self._append(self._keys.metrics, fields)

    async def metrics(self, after: str = "0-0", *, block_s: float = 0.0) -> list[tuple[str, dict[str, str]]]:
        """(id, fields) of entries after `after`, waiting up to `block_s` for one."""
        if block_s:
            entries = await wait_for_entries(self._blocking, self._keys.metrics, after, block_s, count=1000)
        else:
            entries = await self._redis.xrange(self._keys.metrics, f"({after}", count=1000)
        return [(id_.decode(), _text(fields)) for id_, fields in entries]

    async def newest(self, count: int, kinds: set[str]) -> tuple[str, list[dict[str, str]]]:
        """The newest `count` entries of these kinds, oldest first; and where the log ends, for `metrics` to go on from."""
        found: list[dict[str, str]] = []
        start, end = "+", ""
        while len(found) < count or not end:
            entries = await self._redis.xrevrange(self._keys.metrics, start, count=SLICE)
            end = end or (entries[0][0].decode() if entries else "0-0")
            found += [
                _text(fields) for _, fields in entries if fields.get(b"kind", b"").decode(errors="replace") in kinds
            ]
            if len(entries) < SLICE:
                break
            start = f"({entries[-1][0].decode()}"
        return end, found[:count][::-1]

    async def control(self, event: str, who: str, detail: str = "") -> None:
        await self._append(self._keys.control, {"event": event, "who": who, "detail": detail})

    async def _append(self, log: str, fields: Mapping[str, str]) -> None:
        flat = [text for pair in fields.items() for text in pair]
        await self._scripts.append(keys=[log, self._keys.once(uuid4().hex)], args=[ONCE_S, KEEP, *flat])


def _text(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}

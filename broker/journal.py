"""Two logs people read: `metrics` (one entry per step, update, evaluation) and `control` (who did what, when).

They are logs, not state: trimmed, and in the rare case of a lost reply an entry may stand twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from lachesis.broker.connection import Redis
from lachesis.broker.keys import Keys
from lachesis.broker.lua import Scripts

KEEP = 100_000  # entries, approximately


class Journal:
    def __init__(self, redis: Redis, blocking: Redis, scripts: Scripts, keys: Keys) -> None:
        self._redis, self._blocking, self._scripts, self._keys = redis, blocking, scripts, keys

    async def metric(self, kind: str, values: Mapping[str, object]) -> None:
        """Append one entry of `kind`: step | update | eval | queue."""
        fields = {"kind": kind, **{key: f"{v:.6g}" if isinstance(v, float) else str(v) for key, v in values.items()}}
        await self._append(self._keys.metrics, fields)

    async def metrics(self, after: str = "0-0", *, block_s: float = 0.0) -> list[tuple[str, dict[str, str]]]:
        """(id, fields) of entries after `after`, waiting up to `block_s` for one."""
        redis, block = (self._blocking, max(1, int(block_s * 1000))) if block_s else (self._redis, None)
        found = await redis.xread({self._keys.metrics: after}, count=1000, block=block)
        entries = found[0][1] if found else []
        return [(id_.decode(), {k.decode(): v.decode() for k, v in fields.items()}) for id_, fields in entries]

    async def control(self, event: str, who: str, detail: str = "") -> None:
        await self._append(self._keys.control, {"event": event, "who": who, "detail": detail})

    async def _append(self, key: str, fields: Mapping[str, str]) -> None:
        await self._scripts.append(keys=[key], args=["*", KEEP, *(text for pair in fields.items() for text in pair)])

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
ONCE_S = 300  # a command is not sent again after so long


class Journal:
    def __init__(self, redis: Redis, blocking: Redis, scripts: Scripts, keys: Keys) -> None:
        self._redis, self._blocking, self._scripts, self._keys = redis, blocking, scripts, keys

    async def metric(self, kind: str, values: Mapping[str, object]) -> None:
        """Append one entry of `kind`: step | update | eval | queue."""
        fields = {"kind": kind, **{key: f"{v:.6g}" if isinstance(v, float) else str(v) for key, v in values.items()}}
        await self._append(self._keys.metrics, fields)

    async def metrics(self, after: str = "0-0", *, block_s: float = 0.0) -> list[tuple[str, dict[str, str]]]:
        """(id, fields) of entries after `after`, waiting up to `block_s` for one."""
        if block_s:
            entries = await wait_for_entries(self._blocking, self._keys.metrics, after, block_s, count=1000)
        else:
            entries = await self._redis.xrange(self._keys.metrics, f"({after}", count=1000)
        return [(id_.decode(), {k.decode(): v.decode() for k, v in fields.items()}) for id_, fields in entries]

    async def control(self, event: str, who: str, detail: str = "") -> None:
        await self._append(self._keys.control, {"event": event, "who": who, "detail": detail})

    async def _append(self, log: str, fields: Mapping[str, str]) -> None:
        flat = [text for pair in fields.items() for text in pair]
        await self._scripts.append(keys=[log, self._keys.once(uuid4().hex)], args=[ONCE_S, KEEP, *flat])

"""Two logs people read: `metrics` and `control`.

`metrics` has one entry per step, step of a shadow, update, evaluation, and example (a rollout in words); `control` says
who did what. An entry's id says when it was written.

They are logs, not state: trimmed. An entry stands once, also where the client had to send it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias
from uuid import uuid4

from lachesis.broker.run_view import RunView
from lachesis.broker.store.connection import wait_for_entries

KEEP_METRICS = 100_000  # entries of `metrics`, approximately
KEEP_EVENTS = 10_000  # of `control`, which whoever may call can write to; as includes/log_event.lua has it
EVENT_CHARACTERS = 4096  # of what happened; who did it is a name
SLICE = 500  # entries read at a time
COMMAND_ONCE_S = 300  # a command is not sent again after so long

Entry: TypeAlias = tuple[str, dict[str, str]]  # its id and its fields


class Journal:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def metric(self, kind: str, values: Mapping[str, object]) -> None:
        """Append one entry of `kind`: step | shadow (a step of one) | update | eval | example."""
        fields = {"kind": kind, **{key: f"{v:.6g}" if isinstance(v, float) else str(v) for key, v in values.items()}}
        await self._append(self._view.keys.metrics, fields, KEEP_METRICS)

    async def metrics(self, after: str = "0-0", *, block_s: float = 0.0) -> list[Entry]:
        """Entries after `after`, waiting up to `block_s` for one."""
        return await self._after(self._view.keys.metrics, after, block_s)

    async def newest(self, count: int, kinds: set[str]) -> tuple[str, list[Entry]]:
        """The newest `count` entries of these kinds, oldest first; and where the log ends, for `metrics` to go on from."""
        return await self._newest(self._view.keys.metrics, count, lambda fields: fields.get("kind") in kinds)

    async def control(self, event: str, who: str, detail: str = "") -> None:
        fields = {"event": event, "who": who[:EVENT_CHARACTERS], "detail": detail[:EVENT_CHARACTERS]}
        await self._append(self._view.keys.control, fields, KEEP_EVENTS)

    async def events(self, after: str, *, block_s: float = 0.0) -> list[Entry]:
        """What `metrics` is, of the log `control`."""
        return await self._after(self._view.keys.control, after, block_s)

    async def newest_events(self, count: int) -> tuple[str, list[Entry]]:
        """What `newest` is, of the log `control`."""
        return await self._newest(self._view.keys.control, count, lambda fields: True)

    async def _after(self, log: str, after: str, block_s: float) -> list[Entry]:
        if block_s:
            entries = await wait_for_entries(self._view.blocking, log, after, block_s, count=1000)
        else:
            entries = await self._view.redis.xrange(log, f"({after}", count=1000)
        return [_entry(*entry) for entry in entries]

    async def _newest(self, log: str, count: int, wanted: Callable[[dict[str, str]], bool]) -> tuple[str, list[Entry]]:
        found: list[Entry] = []
        start, end = "+", ""
        while len(found) < count or not end:
            entries = [_entry(*entry) for entry in await self._view.redis.xrevrange(log, start, count=SLICE)]
            end = end or (entries[0][0] if entries else "0-0")
            found += [entry for entry in entries if wanted(entry[1])]
            if len(entries) < SLICE:
                break
            start = f"({entries[-1][0]}"
        return end, found[:count][::-1]

    async def _append(self, log: str, fields: Mapping[str, str], keep: int) -> None:
        flat = [text for pair in fields.items() for text in pair]
        await self._view.scripts.append_capped(
            keys=[self._view.keys.once(uuid4().hex)], args=[log, COMMAND_ONCE_S, keep, *flat]
        )


def written_at(id_: str) -> float:
    """When an entry was written, in seconds since the epoch, by the clock of Redis."""
    return int(id_.split("-")[0]) / 1000


def _entry(id_: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    return id_.decode(), {
        name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()
    }

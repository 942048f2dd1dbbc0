"""Published versions: what a trainer appends and inference servers follow.

The event is written last, after the files are complete. Its stream id is `<version>-1`, so a repeated or
an older version can't enter. Followers read with cursors of their own: every server needs every version.
"""

from __future__ import annotations

from lachesis.broker.errors import Conflict
from lachesis.broker.records.entries import flat_entry, read_entries
from lachesis.broker.records.versions import WeightsEntry
from lachesis.broker.run_view import RunView
from lachesis.broker.store.connection import wait_for_entries

LOOK_BACK = 3  # entries, should the newest be unreadable


class Weights:
    """The `weights:<policy>` streams of one run."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    async def publish(self, policy: str, entry: WeightsEntry) -> bool:
        """Append a version. False if this version was published before; Conflict if a newer one was, and not this."""
        fields = flat_entry(entry)
        reply = await self._view.scripts.publish(keys=[self._view.keys.weights(policy)], args=[entry.version, *fields])
        if reply == b"older":
            newest = await self.newest(policy)
            raise Conflict(
                f"version {entry.version} of policy {policy!r} can't be published after version {newest.version if newest else '?'}"
            )
        return bool(reply == b"published")

    async def get(self, policy: str, version: int) -> WeightsEntry | None:
        found = await self._view.redis.xrange(self._view.keys.weights(policy), f"{version}-1", f"{version}-1")
        return next((entry for _, entry in read_entries(WeightsEntry, found)), None)

    async def published(self, policy: str) -> list[WeightsEntry]:
        """Every version that was ever published, oldest first; the files of some may be gone."""
        found = await self._view.redis.xrange(self._view.keys.weights(policy))
        return [entry for _, entry in read_entries(WeightsEntry, found)]

    async def newest(self, policy: str) -> WeightsEntry | None:
        """The newest version that can be read."""
        end = "+"
        while found := await self._view.redis.xrevrange(self._view.keys.weights(policy), end, count=LOOK_BACK):
            if readable := read_entries(WeightsEntry, found):
                return readable[0][1]
            end = f"({found[-1][0].decode()}"
        return None

    async def wait_newer(self, policy: str, than: int, timeout_s: float) -> WeightsEntry | None:
        """The newest version above `than`, waiting up to `timeout_s` for one to appear."""
        known = await self._view.redis.xrevrange(
            self._view.keys.weights(policy), count=1
        )  # perhaps one that can't be read
        newest = await self.newest(policy)  # after that: one that is published in between is not waited for
        if newest is None or newest.version <= than:
            cursor = known[0][0].decode() if known else "0-0"
            if not await wait_for_entries(self._view.blocking, self._view.keys.weights(policy), cursor, timeout_s):
                return None
            newest = await self.newest(policy)
        return newest if newest is not None and newest.version > than else None

"""The servers of a pool as one front door sees them, and which of them takes the next request.

Pure: time comes in as an argument, and statuses from whoever reads them. Machines' clocks may differ, so a server is
fresh as long as its heartbeat keeps changing here; only at first sight must its heartbeat be of now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from zlib import crc32

import anyio

from lachesis.broker.records.versions import ServerStatus

NO_NEW_REQUESTS_S = 5.0  # a server silent for this long gets no new requests
LOST_S = 30.0  # and after this, its machine is taken for gone, and what runs there is repeated elsewhere
BUSIER_TIMES, BUSIER_BY = 1.25, 4  # a prompt's server may run this many times the least, and this many more
TAKES_REQUESTS = ("ready", "updating")  # an update only holds requests for a moment; but in place, see prefix_cache.py


@dataclass(eq=False)
class Server:
    """One server of the pool."""

    status: ServerStatus
    changed_at: float  # when its heartbeat last changed, on our clock
    calls: set[anyio.CancelScope] = field(default_factory=set)  # requests of this front door that run there
    turn: int = 0  # of its last request: those equally busy take turns
    seed: int = 0  # of its name: its part in choosing a server for a prompt
    failed_at: float | None = None  # the heartbeat it had when a call failed; it is trusted again after the next
    suspect: object | None = None  # a request that may be why another server was lost, while it is tried here

    @property
    def name(self) -> str:
        return self.status.server

    @property
    def url(self) -> str:
        return self.status.url

    def takes_requests(self, now: float) -> bool:
        return (
            self.status.state in (("ready",) if self.status.prefix_key else TAKES_REQUESTS)
            and now - self.changed_at < NO_NEW_REQUESTS_S
            and self.failed_at != self.status.heartbeat
        )


class Pool:
    """Keeps the servers and wakes those who wait for one.

    With `max_lag`, servers more than so many versions behind the newest published one get no requests; 0: any do.
    """

    def __init__(self, max_lag: int = 0) -> None:
        self._max_lag, self._newest = max_lag, -1
        self._servers: dict[str, Server] = {}
        self._refreshed_at = float("-inf")
        self._turns = 0
        self._awaited, self._awaited_until = -1, float("-inf")
        self._changed = anyio.Event()

    def refresh(self, statuses: Iterable[ServerStatus], *, now: float, wall: float) -> None:
        """Take over what Redis says. `now` is a monotonic clock's time, `wall` seconds since the epoch."""
        self._refreshed_at = now
        listed = {status.server: status for status in statuses}
        for name, status in listed.items():
            known = self._servers.get(name)
            if known is None:
                age = 0.0 if abs(wall - status.heartbeat) < NO_NEW_REQUESTS_S else LOST_S
                self._servers[name] = Server(status, changed_at=now - age, seed=crc32(name.encode()))
            else:
                if status.heartbeat != known.status.heartbeat:
                    known.changed_at = now
                known.status = status
        for name, server in list(self._servers.items()):
            if name not in listed or now - server.changed_at > LOST_S:
                for call in list(server.calls):
                    call.cancel()
            if name not in listed:
                del self._servers[name]
        self.wake()

    def await_version(self, version: int, until: float) -> None:
        """Until then, or until a server serves it, new requests wait for `version` instead of being made stale.

        Not where the pool's rule keeps its servers from following the newest version.
        """
        self._awaited, self._awaited_until = version, until
        self._newest = max(self._newest, version)

    def pick(self, key: int | None = None, *, alone: bool = False) -> Server | None:
        """The server with the fewest running requests of those that take some, as of the last refresh.

        Requests of one `key` go to one server, which has their beginning in its cache, unless it is clearly busier.
        `alone`: none that has a suspect.
        """
        able = [server for server in self.able() if not (alone and server.suspect)]
        if any(server.status.rule == "newest" for server in able):
            oldest = self._newest - self._max_lag if self._max_lag else -1
            if self._refreshed_at < self._awaited_until:
                oldest = max(oldest, self._awaited)
            able = [server for server in able if server.status.version >= oldest]
        if not able:
            return None
        picked = min(able, key=lambda server: (len(server.calls), server.turn))
        if key is not None and len(able) > 1:
            preferred = max(able, key=lambda server: _mixed(key, server.seed))
            if len(preferred.calls) <= BUSIER_TIMES * len(picked.calls) + BUSIER_BY:
                picked = preferred
        self._turns += 1
        picked.turn = self._turns
        return picked

    def able(self) -> list[Server]:
        """Servers that take requests. While Redis is away, nobody grows stale."""
        return [server for server in self._servers.values() if server.takes_requests(self._refreshed_at)]

    def failed(self, server: Server) -> None:
        """A call to the server failed: no more requests until it has reported again."""
        server.failed_at = server.status.heartbeat

    def wake(self) -> None:
        """Let everyone who waits look again."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for_change(self) -> None:
        await self._changed.wait()


def _mixed(key: int, seed: int) -> int:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): of a key's servers the highest number takes it.

    A server that comes or goes moves only its own share of the keys.
    """
    mixed = (key << 32 | seed) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
    return mixed ^ mixed >> 32

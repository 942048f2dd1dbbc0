"""What the pool knows of one server, reported every second and at once when it changes."""

from __future__ import annotations

import time
from typing import Any

import anyio
from msgspec import structs
from redis.exceptions import RedisError
from structlog.stdlib import BoundLogger

from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.run.registry import Registry

INTERVAL_S = 1.0


class Heartbeat:
    """Keeps one `ServerStatus` in Redis up to date, also while Redis comes and goes."""

    def __init__(self, registry: Registry, status: ServerStatus, log: BoundLogger) -> None:
        self._parties, self._log = registry, log
        self.status = status
        self._changed = anyio.Event()
        self._one_at_a_time = anyio.Lock()  # else an older report could overtake a newer one

    def change(self, **fields: Any) -> None:
        """Set fields of the status; the report follows without waiting for it."""
        self.status = structs.replace(self.status, **fields)
        self._changed.set()

    async def announce(self, **fields: Any) -> None:
        """Set fields of the status and return when Redis has them. Raises what redis-py raises."""
        self.status = structs.replace(self.status, **fields)
        await self._report()

    async def _report(self) -> None:
        async with self._one_at_a_time:
            await self._parties.report(structs.replace(self.status, heartbeat=time.time()))

    async def run(self) -> None:
        """Report until cancelled."""
        silent = False
        while True:
            self._changed = anyio.Event()
            try:
                await self._report()
                if silent:
                    self._log.info("Redis answers again")
                silent = False
            except (RedisError, OSError) as error:
                if not silent:
                    self._log.warning("Redis does not answer; serving on with the weights at hand", error=str(error))
                silent = True
            with anyio.move_on_after(INTERVAL_S):
                await self._changed.wait()

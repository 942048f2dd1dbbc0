"""Keeps a front door's picture of its pool fresh: servers and versions, from Redis."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import anyio
from redis.exceptions import RedisError
from structlog.stdlib import BoundLogger

from lachesis.broker import Broker
from lachesis.broker.records.versions import ServerStatus
from lachesis.inference.gateway.pool import TAKES_REQUESTS, Pool
from lachesis.inference.gateway.prefix_cache import ALONE
from lachesis.inference.settings import FrontDoorSettings

REFRESH_S = 0.5
REFRESH_WAITING_S = 0.02  # while a request waits for a server
VERSION_WAIT_S = 5.0  # one wait for a newer version
REDIS_RETRY_S = 1.0  # while Redis is away


class PoolWatch:
    """Refreshes `pool`; `waiting` says how many requests wait for a server now."""

    def __init__(
        self, pool: Pool, settings: FrontDoorSettings, broker: Broker, waiting: Callable[[], int], log: BoundLogger
    ) -> None:
        self._pool, self._settings, self._broker, self._waiting, self._log = pool, settings, broker, waiting, log
        self._look_now = anyio.Event()
        self._statuses: Sequence[ServerStatus] = ()

    def look_now(self) -> None:
        """Do not wait for the next regular look."""
        self._look_now.set()

    async def keep_pool(self) -> None:
        """Read the pool's servers from Redis until cancelled; while Redis is away, the last ones known serve on."""
        silent = False
        known: set[str] = set()
        while True:
            self._look_now = anyio.Event()
            try:
                self._statuses = await self._broker.registry.servers(self._settings.pool)
                silent = False
            except (RedisError, OSError) as error:
                if not silent:
                    self._log.warning("Redis does not answer; the servers known last serve on", error=str(error))
                silent = True
            if self._settings.upstream:
                self._pool.refresh([self._upstream()], now=time.monotonic(), wall=time.time())
            elif not silent:
                self._pool.refresh(self._statuses, now=time.monotonic(), wall=time.time())
            able = {server.name for server in self._pool.able()}
            if able != known:
                self._log.info("servers", ready=" ".join(sorted(able)) or "none", pool=self._settings.pool)
                known = able
            if self._waiting():
                await anyio.sleep(REFRESH_WAITING_S)
                continue
            with anyio.move_on_after(REFRESH_S):
                await self._look_now.wait()

    async def follow_versions(self) -> None:
        """Have new requests wait for a newly published version, for a moment, until cancelled.

        A generation begun just before its server loads the newest weights would reach the trainer a step late.
        """
        seen = -1
        while True:
            try:
                entry = await self._broker.weights.wait_newer(self._settings.policy, seen, VERSION_WAIT_S)
            except (RedisError, OSError):
                await anyio.sleep(REDIS_RETRY_S)
                continue
            if entry is not None:
                seen = entry.version
                self._pool.await_version(seen, time.monotonic() + self._settings.catch_up_s)

    def _upstream(self) -> ServerStatus:
        """The router in the place of its servers. It may send a request to any of them, so the oldest version counts."""
        now = time.time()
        serving = [status for status in self._statuses if status.state in TAKES_REQUESTS]
        return ServerStatus(
            server="upstream",
            pool=self._settings.pool,
            url=self._settings.upstream.rstrip("/"),
            state="ready",
            version=min((status.version for status in serving), default=-1),
            loading=-1,
            heartbeat=now,
            vocab_size=min((status.vocab_size for status in serving if status.vocab_size), default=0),
            prefix_key="" if serving and not any(status.prefix_key for status in serving) else ALONE,
        )

"""Updates of one server: when it is its turn, and how the weights are swapped under its requests."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import anyio
from redis.exceptions import RedisError
from structlog.stdlib import BoundLogger

from lachesis.broker import Broker
from lachesis.broker.failpoints import failpoint
from lachesis.broker.run.servers import live_names
from lachesis.inference.agent.sglang_args import watchdog_s
from lachesis.inference.agent.sglang_process import ServerFailed, SGLangServer
from lachesis.inference.heartbeat import Heartbeat
from lachesis.inference.settings import AgentSettings
from lachesis.inference.versions.watcher import Loadable

UPDATE_TURN_S = 10.0  # a turn lapses unless it is taken again within that time
TURN_POLL_S = 0.05  # while it is another server's turn
POOL_COUNT_S = 1.0  # so often the pool's servers are counted
REQUEST_DRAIN_S = 300.0  # in mode `drain`: for running requests to end; after that they are retracted
IDLE_POLLS, IDLE_POLL_S = 4, 0.25  # a front door may send until it has read that this server takes no requests


class Updates:
    """Swaps weights. `become` sets the server's state."""

    def __init__(self, settings: AgentSettings, broker: Broker, heartbeat: Heartbeat, become: Callable[[str], None], log: BoundLogger) -> None:  # fmt: skip
        self._settings, self._broker, self._heartbeat, self._become, self._log = (
            settings,
            broker,
            heartbeat,
            become,
            log,
        )
        self._pause_limit_s = 0.9 * watchdog_s(settings)
        self._at_once, self._counted_at = settings.update_at_once, -math.inf
        self._newest = -1  # of the versions that were loaded

    async def apply(self, server: SGLangServer, to: Loadable) -> bool:
        """Load a version into a serving server; False, soon, while too many others of the pool update."""
        if not await self._take_turn():
            await anyio.sleep(TURN_POLL_S)
            return False
        failure = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_turn)
                try:
                    await self._update(server, to)
                except ServerFailed as error:  # not as one of a group
                    failure = error
                tasks.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(1.0, shield=True), contextlib.suppress(RedisError, OSError):  # else it lapses
                await self._broker.pools.end_turn(self._settings.pool, self._heartbeat.status.server)
        if failure is not None:
            raise failure
        return True

    def loaded(self, version: int, updates: int) -> str:
        """Note what is served after so many updates; its prefix key, see prefix_cache.py."""
        self._newest = max(self._newest, version)
        return f"{version}.{updates}" if self._settings.update_mode == "in_place" else ""

    async def _update(self, server: SGLangServer, to: Loadable) -> None:
        if self._settings.update_mode == "drain":
            self._become("draining")
            with anyio.move_on_after(REQUEST_DRAIN_S):
                await idle(server)
        else:
            self._become("updating")
        await self.swap(server, to)
        self._become("ready")

    async def swap(self, server: SGLangServer, to: Loadable) -> None:
        """Swap the weights under the running requests. On any doubt the server is not continued but replaced.

        Going back to a version is never done in place: a front door that missed both loads would take what other weights
        read meanwhile under this version's first key for this version's own, so the cache is emptied.

        Raises ServerFailed, also where the pause would become longer than SGLang's watchdog bears.
        """
        in_place = self._settings.update_mode == "in_place" and to.version > self._newest
        with anyio.CancelScope(shield=True):  # SIGTERM waits for the end of it
            began = time.monotonic()
            try:
                with anyio.fail_after(self._pause_limit_s):
                    await server.pause("in_place" if in_place else "retract")
                    failpoint("paused", to.version)
                    paused = time.monotonic()
                    await server.load(to.model.folder, to.version, flush_cache=not in_place)
                    loaded = time.monotonic()
                    checksum = await server.checksum()
                    checked = time.monotonic()
                    await server.resume()
            except TimeoutError:
                raise ServerFailed(f"SGLang was paused for {self._pause_limit_s:g} s, all that its watchdog bears; --sglang-args "
                                   "'--watchdog-timeout SECONDS' allows more") from None  # fmt: skip
        updates, ended = self._heartbeat.status.updates + 1, time.monotonic()
        figures = {
            "verify_s": to.verify_s,
            "load_s": loaded - paused,
            "checksum_s": checked - loaded,
            "pause_s": ended - began,
            "total_s": ended - to.found_at,
        }
        self._heartbeat.change(
            version=to.version,
            checksum=checksum,
            loading=-1,
            updates=updates,
            prefix_key=self.loaded(to.version, updates),
            last_update_s=figures["total_s"],
            last_error=to.passed_over,
        )
        rounded = {name: round(value, 3) for name, value in figures.items()}
        self._log.info("updated", version=to.version, checksum=checksum, **rounded)
        with anyio.move_on_after(1.0), contextlib.suppress(RedisError, OSError):  # a log, not state
            what = {"server": self._heartbeat.status.server, "version": to.version, **figures}
            await self._broker.journal.metric("update", what)

    # -- turns ----------------------------------------------------------------------------------------------------

    async def _take_turn(self) -> bool:
        """Whether this server may update now. Without Redis nobody may."""
        status = self._heartbeat.status
        try:
            if self._settings.update_at_once == 0 and time.monotonic() - self._counted_at > POOL_COUNT_S:
                servers = await self._broker.registry.servers(status.pool)
                live = live_names(servers, time.time())
                self._at_once, self._counted_at = math.ceil(len(live | {status.server}) / 2), time.monotonic()
            return await self._broker.pools.take_turn(status.pool, status.server, self._at_once, UPDATE_TURN_S)
        except (RedisError, OSError):  # the heartbeat says so
            return False

    async def _keep_turn(self) -> None:
        while True:
            await anyio.sleep(UPDATE_TURN_S / 3)
            await self._take_turn()


async def idle(server: SGLangServer) -> None:
    """Wait until no request runs there. The caller has told front doors to send none."""
    quiet = 0
    while quiet < IDLE_POLLS:
        await anyio.sleep(IDLE_POLL_S)
        quiet = quiet + 1 if await server.is_idle() else 0

"""Which version a server should load next: the newest published one that passes verification."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from msgspec import Struct
from redis.exceptions import RedisError
from structlog.stdlib import BoundLogger

from lachesis.broker.errors import ConfigurationError, WeightsRefused
from lachesis.broker.records import WeightsEntry
from lachesis.broker.weights import Weights
from lachesis.inference.heartbeat import Heartbeat
from lachesis.inference.model_folder import ModelFolder, read_model_folder
from lachesis.inference.verification import VersionGone, folder_of, verify

RETRY_S = 1.0  # until Redis, or a folder that is not visible yet, is looked at again
POLL_S = 0.5  # for a base model in the making

T = TypeVar("T")


class Loadable(Struct, frozen=True):
    """A version whose files have been found in order."""

    version: int
    model: ModelFolder
    found_at: float  # on the monotonic clock: when its event was read


class VersionFeed:
    """Follows one policy's versions for one server. A refused version is never looked at again."""

    def __init__(
        self, weights: Weights, policy: str, base: Path | None, heartbeat: Heartbeat, log: BoundLogger
    ) -> None:
        self._weights, self._policy, self._base = weights, policy, base
        self._heartbeat, self._log = heartbeat, log
        self._refused: set[int] = set()
        self._suspect: int | None = None  # SGLang failed when it last started from this version
        self._missing: set[int] = set()  # those whose absence has been logged

    async def first(self) -> Loadable:
        """What to start from: the newest good version, else its parents, else the base model; waits for one.

        Raises ConfigurationError for a base model that is there and can't be served.
        """
        said = False
        while True:
            base = None
            if self._base is not None and self._base.exists():
                base = await anyio.to_thread.run_sync(read_model_folder, self._base)
            async for entry in self._newest_first():
                if (found := await self._check(entry, like=base)) is not None:
                    return found
            if base is not None:
                await self._announce(loading=0)
                return Loadable(0, base, time.monotonic())
            if not said:
                place = f"{self._base} to appear or " if self._base else ""
                self._log.info(f"waiting for {place}a version to be published", policy=self._policy)
                said = True
            await anyio.sleep(POLL_S)

    async def newer(self, than: int, like: ModelFolder, timeout_s: float) -> Loadable | None:
        """The newest version above `than`, if it is good and fits the served model; waits up to `timeout_s` for one."""
        self._suspect = None
        than = max([than, *self._refused])
        try:
            with anyio.fail_after(timeout_s + 30):  # a connection that died without a word would block for ever
                entry = await self._weights.wait_newer(self._policy, than, timeout_s)
        except (RedisError, OSError):  # the heartbeat says so
            await anyio.sleep(RETRY_S)
            return None
        if entry is None:
            return None
        found = await self._check(entry, like)
        if found is None and entry.version not in self._refused:
            await anyio.sleep(RETRY_S)
        return found

    def did_not_start(self, tried: Loadable) -> None:
        """SGLang failed while it started from this version. The second time, the version is refused."""
        if tried.version == self._suspect:
            self._refuse(tried.version, f"version {tried.version} refused: SGLang failed twice to start from it")
        self._suspect = tried.version if tried.version > 0 else None

    def _refuse(self, version: int, reason: str) -> None:
        self._refused.add(version)
        self._log.error("version refused, the one before it stays", version=version, reason=reason)
        self._heartbeat.change(loading=-1, last_error=reason)

    async def _newest_first(self) -> AsyncIterator[WeightsEntry]:
        entry = await self._ask(partial(self._weights.newest, self._policy))
        while entry is not None:
            if entry.version not in self._refused:
                yield entry
            if entry.parent >= entry.version:
                return
            entry = await self._ask(partial(self._weights.get, self._policy, entry.parent))

    async def _check(self, entry: WeightsEntry, like: ModelFolder | None) -> Loadable | None:
        """Verify under the collector's eyes: what a status names as `loading` is left alone."""
        found_at = time.monotonic()
        try:
            if not folder_of(entry).is_dir():
                raise VersionGone(f"version {entry.version}: {entry.uri} does not exist")
            await self._announce(loading=entry.version)
            folder = await anyio.to_thread.run_sync(verify, entry, like)
            return Loadable(entry.version, await anyio.to_thread.run_sync(read_model_folder, folder), found_at)
        except VersionGone as gone:
            if entry.version not in self._missing:
                self._log.info("version is gone, looking for a newer one", version=entry.version, folder=entry.uri)
                self._missing.add(entry.version)
            self._heartbeat.change(loading=-1, last_error=str(gone))
        except (WeightsRefused, ConfigurationError) as refused:
            self._refuse(entry.version, str(refused))
        return None

    async def _announce(self, *, loading: int) -> None:
        await self._ask(partial(self._heartbeat.announce, loading=loading))

    async def _ask(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Redis' answer, however long it takes."""
        while True:
            try:
                return await operation()
            except (RedisError, OSError):  # the heartbeat says so
                await anyio.sleep(RETRY_S)

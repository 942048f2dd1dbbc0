"""Which version a server should load next: of those its pool's rule asks for, the first that passes verification."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from msgspec import Struct, structs
from redis.exceptions import RedisError
from structlog.stdlib import BoundLogger

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError, WeightsRefused
from lachesis.broker.records.versions import WeightsEntry
from lachesis.broker.run.servers import live_names
from lachesis.broker.weights.pools import Orders, canaries
from lachesis.inference.heartbeat import Heartbeat
from lachesis.inference.versions.model_folder import ModelFolder, read_model_folder
from lachesis.inference.versions.staging import Staging, is_remote
from lachesis.inference.versions.verification_cache import VerificationCache
from lachesis.inference.versions.verify import VersionGone, folder_of, verify

CANARY_COUNT_S = 1.0  # while there is a canary, who lives is looked at so often
READ_RETRY_S = 1.0  # until Redis, or a folder that is not visible yet, is looked at again
BASE_MODEL_POLL_S = 0.5  # for a base model in the making
MAX_REASON = 1000  # characters of why a version was refused
PASSING = {  # errors of this machine, and not of a version: it is tried again
    errno.EAGAIN, errno.EDQUOT, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip

T = TypeVar("T")


class Loadable(Struct, frozen=True):
    """A version whose files have been found in order."""

    version: int
    model: ModelFolder
    found_at: float  # on the monotonic clock: when its event was read
    verify_s: float = 0.0  # to find that, the copy of a remote one included
    passed_over: str = ""  # why a version that was wanted more is not it


class VersionWatcher:
    """Finds versions for one server. A refused version is never looked at again."""

    def __init__(self, broker: Broker, policy: str, base: Path | None, staging: Staging, verified: VerificationCache | None, heartbeat: Heartbeat, log: BoundLogger) -> None:  # fmt: skip
        self._broker, self._policy, self._base, self._staging = broker, policy, base, staging
        self._verified = verified
        self._heartbeat, self._log = heartbeat, log
        self._refused: dict[int, str] = {}  # and why
        self._suspect: int | None = None  # SGLang failed when it last started from this version
        self._missing: set[int] = set()  # those whose absence has been logged
        self._found: Loadable | None = None  # the last one found, named as `loading` until it is served
        self._absent = False  # a version asked for was not there when last looked for

    async def first(self) -> Loadable:
        """What to start from, for example the newest version, else its parents, else the base model; waits for one.

        Raises ConfigurationError for a base model that is there and can't be served.
        """
        self._found, said = None, False
        while True:
            base = await self._base_model()
            found = await self._best(await self._orders(), -1, base)
            if found is not None:
                return found
            if not said:
                place = f"{self._base} to appear or " if self._base and base is None else ""
                self._log.info(f"waiting for {place}a version that can be served", policy=self._policy)
                said = True
            await anyio.sleep(BASE_MODEL_POLL_S)

    async def next(self, serving: int, like: ModelFolder, timeout_s: float) -> Loadable | None:
        """A version to load in the place of `serving`, which fits the served model; waits up to `timeout_s` for one.

        It is returned again until it is served, or something better is there.
        """
        self._suspect = None
        orders = await self._orders()
        found = await self._best(orders, serving, like)
        if found is None and timeout_s > 0:
            await self._wait(orders, timeout_s)
            found = await self._best(await self._orders(), serving, like)
        return found

    def did_not_start(self, tried: Loadable) -> None:
        """SGLang failed while it started from this version. The second time, the version is refused."""
        if tried.version == self._suspect:
            self._refuse(tried.version, "SGLang failed twice to start from it")
        self._suspect = tried.version if tried.version > 0 else None

    # -- what the rule asks for -----------------------------------------------------------------------------------

    async def _orders(self) -> Orders:
        return await self._ask(partial(self._broker.pools.orders, self._heartbeat.status.pool, self._policy))

    async def _wait(self, orders: Orders, timeout_s: float) -> None:
        """Until there are new orders, or something else may have changed."""
        if self._absent:
            timeout_s = min(timeout_s, READ_RETRY_S)
        elif orders.rule.mode == "canary":
            timeout_s = min(timeout_s, CANARY_COUNT_S)
        try:
            with anyio.fail_after(timeout_s + 30):  # a connection that died without a word would block for ever
                await self._broker.pools.wait_for_orders(self._heartbeat.status.pool, self._policy, orders, timeout_s)
        except (RedisError, OSError):  # the heartbeat says so
            await anyio.sleep(READ_RETRY_S)

    async def _best(self, orders: Orders, serving: int, like: ModelFolder | None) -> Loadable | None:
        """The first good one of those asked for, unless `serving` is."""
        part = await self._part(orders)
        self._absent, passed_over = False, ""
        async for version, entry in self._asked_for(orders, part):
            if version == serving or (part == "newest" and version < serving):
                break
            if version not in self._refused and (found := await self._look_at(version, entry, like)) is not None:
                self._found = structs.replace(found, passed_over=passed_over)
                return self._found
            passed_over = passed_over or self._refused.get(version, "")
        if self._found is not None:
            self._found = None
            self._heartbeat.change(loading=-1)
        return None

    async def _part(self, orders: Orders) -> str:
        """This server's part of the rule: newest | pin | canary | rest."""
        part, status = orders.rule.mode, self._heartbeat.status
        if part == "canary":
            servers = await self._ask(partial(self._broker.registry.servers, status.pool))
            live = live_names(servers, time.time())
            part = "canary" if status.server in canaries(orders.rule, live | {status.server}) else "rest"
        if part != status.rule:
            self._heartbeat.change(rule=part)
        return part

    async def _asked_for(self, orders: Orders, part: str) -> AsyncIterator[tuple[int, WeightsEntry | None]]:
        """Versions in the order in which they are wanted; version 0 is the base model, also where its entry's files are gone."""
        if part == "newest":
            entry = orders.newest
            while entry is not None:
                yield entry.version, entry
                entry = await self._entry(entry.parent) if entry.parent < entry.version else None
            yield 0, None
            return
        rule = orders.rule
        for version in {"pin": (rule.version,), "canary": (rule.version, rule.rest), "rest": (rule.rest,)}[part]:
            entry = await self._entry(version)
            if entry is not None or version == 0:
                yield version, entry

    async def _entry(self, version: int) -> WeightsEntry | None:
        return await self._ask(partial(self._broker.weights.get, self._policy, version))

    # -- whether it can be served ---------------------------------------------------------------------------------

    async def _look_at(self, version: int, entry: WeightsEntry | None, like: ModelFolder | None) -> Loadable | None:
        if self._found is not None and self._found.version == version:
            return self._found
        if entry is not None and not (version == 0 and self._base is not None and not _is_there(entry)):
            found = await self._check(entry, like)
            if found is not None or version > 0 or version in self._refused:
                return found
        if (base := await self._base_model()) is None:
            return None
        await self._announce(loading=0)
        return Loadable(0, base, time.monotonic())

    async def _base_model(self) -> ModelFolder | None:
        if self._base is None or not self._base.exists():
            return None
        return await anyio.to_thread.run_sync(read_model_folder, self._base)

    async def _check(self, entry: WeightsEntry, like: ModelFolder | None) -> Loadable | None:
        """Verify under the collector's eyes: what a status names as `loading` is left alone."""
        found_at = time.monotonic()
        try:
            if not is_remote(entry) and not folder_of(entry).is_dir():
                raise VersionGone(f"version {entry.version}: {entry.uri} does not exist")
            await self._announce(loading=entry.version)
            if is_remote(entry):
                entry = await self._stage(entry)
            folder = await anyio.to_thread.run_sync(verify, entry, like, self._verified)
            model = await anyio.to_thread.run_sync(read_model_folder, folder)
            return Loadable(entry.version, model, found_at, time.monotonic() - found_at)
        except VersionGone as gone:
            self._absent = True
            if entry.version not in self._missing:
                self._log.info("version is gone, looking for another one", version=entry.version, folder=entry.uri)
                self._missing.add(entry.version)
            self._heartbeat.change(loading=-1, last_error=str(gone))
        except (WeightsRefused, ConfigurationError) as refused:
            self._refuse(entry.version, str(refused))
        except Exception as error:  # whoever wrote it can be wrong in ways of his own
            if isinstance(error, OSError) and error.errno in PASSING:
                self._absent = True
                self._heartbeat.change(loading=-1, last_error=f"version {entry.version} can't be read now: {error}")
            else:
                self._refuse(entry.version, f"{type(error).__name__}: {error}")
        return None

    async def _stage(self, entry: WeightsEntry) -> WeightsEntry:
        """The same version, copied to this machine."""
        began, stop = time.monotonic(), threading.Event()
        try:
            folder = await anyio.to_thread.run_sync(self._staging.fetch, entry, stop, abandon_on_cancel=True)
        finally:
            stop.set()
        self._log.info("staged", version=entry.version, uri=entry.uri, seconds=round(time.monotonic() - began, 3))
        return structs.replace(entry, uri=str(folder))

    def _refuse(self, version: int, reason: str) -> None:
        said = f"version {version} refused: "
        reason = (reason if reason.startswith(said) else said + reason)[:MAX_REASON]
        self._refused[version] = reason
        self._log.error("version refused, the one before it stays", version=version, reason=reason)
        self._heartbeat.change(loading=-1, last_error=reason)

    # -- Redis, which comes and goes ------------------------------------------------------------------------------

    async def _announce(self, *, loading: int) -> None:
        await self._ask(partial(self._heartbeat.announce, loading=loading))

    async def _ask(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Redis' answer, however long it takes."""
        while True:
            try:
                return await operation()
            except (RedisError, OSError):  # the heartbeat says so
                await anyio.sleep(READ_RETRY_S)


def _is_there(entry: WeightsEntry) -> bool:
    """Whether it has a folder; of a URL only fetching tells."""
    try:
        return is_remote(entry) or folder_of(entry).is_dir()
    except (WeightsRefused, ValueError):
        return False

"""The right to write one policy: its writer lock and the lease of the batch in work, kept alive off the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import anyio
from redis.exceptions import RedisError

from lachesis.broker import BlockingBroker, LeaseLost
from lachesis.broker.records.steps import Lease
from lachesis.broker.store.redis_errors import describe, trouble

LOST_POLL_S = 0.2


class WriteAccess(Protocol):
    """The right to publish a policy's versions and to save its checkpoints."""

    def check(self) -> None:
        """Raise LeaseLost if another process has it by now."""


class WriterLease:
    """`with WriterLease(…) as tenure:` asks for the lock at once and holds it until the end, or until it is lost.

    The heartbeat lives in the broker's thread, so that neither an import nor a long step starves it. Two trainers of a
    policy never write at once: whoever has lost the lock is refused at COMMIT by its token, whether it knows or not.
    """

    def __init__(self, broker: BlockingBroker, policy: str, *, ttl_s: float) -> None:
        self._broker, self._policy, self._ttl_s = broker, policy, ttl_s
        self._lock = broker.broker.registry.writer(policy, ttl_s=ttl_s)
        self._held, self._lost = threading.Event(), threading.Event()
        self._why = ""
        self.lease: Lease | None = None  # the batch in work; set by the main thread

    def __enter__(self) -> WriterLease:
        self._heartbeat = self._broker.portal.start_task_soon(self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.cancel()
        if self._held.is_set() and not self._lost.is_set():
            self._broker.call(self._release)

    def wait(self, *, unless: Callable[[], bool], on_standby: Callable[[], None]) -> bool:
        """Wait until the lock is held; False if `unless` came true first. `on_standby` is called once if it takes long."""
        told = False
        while not self._held.wait(LOST_POLL_S):
            self.check()
            if unless():
                return False
            if not told:
                on_standby()
                told = True
        return True

    @property
    def token(self) -> str:
        """What COMMIT compares with the lock."""
        token: bytes = self._lock.local.token
        return token.decode()

    def check(self) -> None:
        """Raise LeaseLost if the lock is no longer ours."""
        if self._lost.is_set():
            raise LeaseLost(f"the right to write policy {self._policy!r} was lost: {self._why}")

    async def _hold(self) -> None:
        try:
            await self._lock.acquire()
            self._held.set()
            while True:
                await anyio.sleep(self._ttl_s / 3)
                await self._lock.extend(self._ttl_s, replace_ttl=True)
                if self.lease is not None:
                    await self._broker.broker.queue.renew(self._policy, self.lease)
        except RedisError as error:
            self._why = describe(error) if trouble(error) else str(error) or type(error).__name__
            self._lost.set()

    async def _release(self) -> None:
        if await self._lock.owned():
            await self._lock.release()

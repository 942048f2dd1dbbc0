"""Publishing beside training: the step loop copies the weights, a thread of its own writes and announces them.

One version is written at a time and every version that is due is published, in order: the next copy waits until the
version before it is announced. What environments may make next is told in the same order: a batch goes on counting as
queued until the versions before it are out, so that nothing is sampled from older ones than need be.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from structlog.stdlib import BoundLogger
from torch import Tensor

from lachesis.broker import BlockingBroker
from lachesis.broker.failpoints import failpoint
from lachesis.broker.run.servers import is_live
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.weights.remote import RemoteVersions
from lachesis.trainer.weights.versions import VersionStore
from lachesis.trainer.writer_lock import WriteAccess

SERVER_GONE_S = 600.0  # a server silent for this long no longer holds a version on disk
SERVED_POLL_S = 0.02  # between two looks at what the servers serve


def make_publisher(broker: BlockingBroker, plan: Plan, right: WriteAccess, log: BoundLogger) -> Publisher:
    """The publisher of the policy that `plan` is about, by who has the `right` to."""
    return Publisher(
        broker,
        plan.policy,
        VersionStore(plan.weights_dir, plan.model_dir, dtype=plan.weights_dtype),
        right,
        keep_versions=plan.keep_versions,
        remote=RemoteVersions(plan.weights_url, log, plan.full_every) if plan.weights_url else None,
        shadow=plan.shadow is not None,
    )


class Publisher:
    """`with Publisher(…) as publisher:`; what goes wrong in its thread is raised by the next call, in the caller's."""

    def __init__(
        self,
        broker: BlockingBroker,
        policy: str,
        versions: VersionStore,
        writer_lease: WriteAccess,
        *,
        keep_versions: int,
        remote: RemoteVersions | None = None,
        shadow: bool = False,
    ) -> None:
        """`remote`: where agents fetch the versions; None: they read them where `versions` are written.

        What a `shadow` trains does not count as delivered: environments make what the other policy's trainer has taken.
        """
        self._shadow = shadow
        self._broker, self._policy, self._versions, self._writer_lease = broker, policy, versions, writer_lease
        self._keep_versions = keep_versions
        self._worker = ThreadPoolExecutor(1, "publisher")
        self._in_work: deque[Future[None]] = deque()
        self._hurry = threading.Event()
        self._remote = remote
        if remote is not None:
            remote.bind(rest=self._hurry.wait, go_on=writer_lease.check)
        self.newest = -1  # version announced
        self.write_s = 0.0  # from its copy to its announcement

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hurry.set()
        self._worker.shutdown()  # a version in work is finished

    def resume(self, newest: int) -> None:
        """`newest` is announced; what is on disk beyond it was complete and never announced."""
        self.newest = newest
        for version in self._versions.versions():
            if version > newest:
                self._versions.remove(version)

    def publish(self, version: int, parent: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the weights and return; they are the model after step `version`, `parent` is the version before.

        Raises WeightsRefused, and for the version before this one what `flush` raises.
        """
        self.flush()
        copied = self._versions.copy(version, tensors)
        self._in_work.append(self._worker.submit(self._write, version, parent, copied))

    def deliver(self, step: int, *, served: bool = False) -> None:
        """Let batches up to `step` count as delivered when what was handed over is announced, or `served` by all servers."""
        if not self._shadow:
            self._in_work.append(self._worker.submit(self._deliver, step, served))

    def flush(self, *, hurry: bool = False) -> None:
        """Wait until everything is announced. Raises StorageError, or LeaseLost if another trainer took over.

        With `hurry` servers are waited for no longer.
        """
        if hurry:
            self._hurry.set()
        while self._in_work:
            self._in_work.popleft().result()

    def check(self) -> None:
        """Raise what `flush` raises if it's known by now, without waiting."""
        while self._in_work and self._in_work[0].done():
            self._in_work.popleft().result()

    def _deliver(self, step: int, served: bool) -> None:
        while served and not self._hurry.is_set() and self._awaited():
            self._hurry.wait(SERVED_POLL_S)
        self._broker.call(self._broker.broker.queue.deliver, step)

    def _awaited(self) -> bool:
        """Whether a server at work that follows the newest version, and can, still samples from an older one."""
        now = time.time()
        servers = self._broker.call(self._broker.broker.registry.servers)
        at_work = [server for server in servers if is_live(server, now) and server.state in ("ready", "updating")]
        return any(
            server.version < self.newest for server in at_work if server.rule == "newest" and not server.last_error
        )

    def _write(self, version: int, parent: int, copied: list[tuple[str, Tensor]]) -> None:
        began = time.perf_counter()
        self._writer_lease.check()
        entry = self._versions.write(version, version, parent, copied, self._writer_lease.check)
        if self._remote is not None:
            entry = self._remote.upload(entry, self._versions.path(version))
        failpoint("announce", version)
        self._writer_lease.check()
        self._broker.call(self._broker.broker.weights.publish, self._policy, entry)
        self.newest, self.write_s = version, time.perf_counter() - began

        alive = time.time() - SERVER_GONE_S
        servers = self._broker.call(self._broker.broker.registry.servers)
        in_use = {v for server in servers if server.heartbeat > alive for v in (server.version, server.loading)}
        in_use |= self._broker.call(self._ruled, {"main", *(server.pool for server in servers)})
        if self._remote is None:
            self._versions.collect(keep=self._keep_versions, in_use=in_use)
            return
        self._versions.collect(keep=1, in_use=set())
        there = [other for other in self._remote.versions() if other <= version]
        kept = in_use | set(there[-self._keep_versions :])
        self._remote.collect(version, lambda other: self._announced(other) if other in kept else None)

    def _announced(self, version: int) -> str | None:
        entry = self._broker.call(self._broker.broker.weights.get, self._policy, version)
        return entry.uri if entry else None

    async def _ruled(self, pools: set[str]) -> set[int]:
        """Versions that a pool is to serve, whether or not a server does now."""
        rules = [(await self._broker.broker.pools.rule(pool))[1] for pool in pools]
        return {version for rule in rules for version in (rule.version, rule.rest)}

"""Publishing beside training: the step loop copies the weights, a thread of its own writes and announces them.

One version is written at a time and every version that is due is published, in order: the next copy waits until the
version before it is announced.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from lachesis.broker import BlockingBroker
from lachesis.broker.crash import crash_point
from lachesis.trainer.tenure import Tenure
from lachesis.trainer.versions import VersionStore

SERVER_GONE_S = 600.0  # a server silent for this long no longer holds a version on disk


class Publisher:
    """`with Publisher(…) as publisher:`; what goes wrong in its thread is raised by the next call, in the caller's."""

    def __init__(
        self, broker: BlockingBroker, policy: str, versions: VersionStore, tenure: Tenure, *, keep_versions: int
    ) -> None:
        self._broker, self._policy, self._versions, self._tenure = broker, policy, versions, tenure
        self._keep_versions = keep_versions
        self._worker = ThreadPoolExecutor(1, "publisher")
        self._in_work: Future[None] | None = None
        self.newest = -1  # version announced
        self.write_s = 0.0  # from its copy to its announcement

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        self._in_work = self._worker.submit(self._write, version, parent, copied)

    def flush(self) -> None:
        """Wait until everything is announced. Raises StorageError, or LeaseLost if another trainer took over."""
        if self._in_work is not None:
            in_work, self._in_work = self._in_work, None
            in_work.result()

    def check(self) -> None:
        """Raise what `flush` raises if it's known by now, without waiting."""
        if self._in_work is not None and self._in_work.done():
            self.flush()

    def _write(self, version: int, parent: int, copied: list[tuple[str, Tensor]]) -> None:
        began = time.perf_counter()
        self._tenure.check()
        entry = self._versions.write(version, version, parent, copied)
        crash_point("announce", version)
        self._tenure.check()
        self._broker.call(self._broker.broker.weights.publish, self._policy, entry)
        self.newest, self.write_s = version, time.perf_counter() - began

        alive = time.time() - SERVER_GONE_S
        servers = self._broker.call(self._broker.broker.parties.servers)
        in_use = {v for server in servers if server.heartbeat > alive for v in (server.version, server.loading)}
        self._versions.collect(keep=self._keep_versions, in_use=in_use)

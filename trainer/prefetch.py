"""The batches of one policy, in order; the next one is fetched and mapped while the one before it trains.

What is made ready ahead is looked at, not leased. So it still counts as queued, and environments don't make more because
of it; and it counts as lent only when its training begins, so a step that kills its trainers uses up none of the next
one's deliveries. The lease decides: what was made ready is thrown away if another batch is lent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from redis.exceptions import ResponseError

from lachesis.broker import BlockingBroker, Conflict
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.broker.records.steps import BatchEntry, Lease, LedgerEntry
from lachesis.broker.retention.dead_letters import untrainable
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.writer_lock import WriterLease

STOP_POLL_S = 0.25  # how soon a request to stop is noticed while waiting
REST_S = 0.05  # between two looks at the queue while a step trains


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as the learner takes it, and the seconds that took."""

    entry: BatchEntry | LedgerEntry
    groups: list[Group]
    batch: TrainingBatch
    untrainable: tuple[DeadEntry, ...]  # sequences that the step is trained without
    fetch_s: float
    map_s: float


def letters(batch: TrainingBatch) -> tuple[DeadEntry, ...]:
    """What COMMIT is to note of the sequences that are not trained."""
    return tuple(
        untrainable(reason.gid, reason.row, f"{reason.field} = {reason.value!r}: {reason.rule}"[:1000])
        for reason in batch.untrainable
    )


class Prefetcher:
    """`with Prefetcher(…) as feed:`; then `next` for each step. With `lachesis.prefetch` one batch is made ready ahead."""

    def __init__(
        self,
        broker: BlockingBroker,
        plan: Plan,
        writer_lease: WriterLease,
        mapping: Callable[[Sequence[Group]], TrainingBatch],
    ) -> None:
        self._broker, self._plan, self._writer_lease, self._mapping = broker, plan, writer_lease, mapping
        self._queue = broker.broker.queue
        self._worker = ThreadPoolExecutor(1, "feed")
        self._ahead: Future[PreparedBatch | None] | None = None
        self._wanted, self._closing = threading.Event(), threading.Event()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._wanted.set()
        self._worker.shutdown()

    def next(self, after: int, stopping: Callable[[], bool]) -> tuple[Lease, PreparedBatch] | None:
        """Lease the batch that comes after step `after`, waiting for it; None if `stopping` came first.

        Raises Conflict if the run was reset.
        """
        self._wanted.set()
        while not stopping():
            self._writer_lease.check()
            self._ahead = self._ahead or self._worker.submit(self._make_ready, after)
            if not wait([self._ahead], STOP_POLL_S).done:
                continue
            ready, self._ahead = self._ahead.result(), None
            lease = self._lease()
            if lease is None or ready is None:  # another reader of this policy took it, or it was given up
                continue
            if lease.batch.step <= after:
                raise Conflict(f"got step {lease.batch.step} after step {after}: run {self._plan.run!r} was reset")
            if lease.batch != ready.entry:
                if not self._fits(lease.batch):
                    continue
                ready = self.load(lease.batch)
            self._writer_lease.lease = lease
            self._wanted.clear()
            if self._plan.prefetch and lease.batch.step < self._plan.num_steps:
                self._ahead = self._worker.submit(self._make_ready, lease.batch.step)
            return lease, ready
        return None

    def load(self, entry: BatchEntry | LedgerEntry) -> PreparedBatch:
        """Fetch a batch's groups and map them. Raises Conflict if they are gone."""
        began = time.perf_counter()
        groups = fetch(self._broker, self._plan, entry)
        fetched = time.perf_counter()
        batch = self._mapping(groups)
        mapped = time.perf_counter()
        return PreparedBatch(entry, groups, batch, letters(batch), fetched - began, mapped - fetched)

    def _make_ready(self, after: int) -> PreparedBatch | None:
        """In the worker: what will be lent after step `after`, formed if need be; None once the feed is closed.

        A shadow forms nothing: batches are the other policy's steps, made when its trainer wants one.
        """
        while not self._closing.is_set():
            newest = self._broker.call(self._queue.newest_group)
            with noticing_resets(self._plan.run, self._plan.policy):
                entry = self._broker.call(self._queue.upcoming, self._plan.policy, after)
            if entry is not None:
                if not self._fits(entry):
                    self._wanted.wait(REST_S)
                    continue
                try:
                    ready = self.load(entry)
                except Conflict:
                    if self._plan.shadow is None or self._plan.shadow.kind == "lossless":
                        raise
                    self._wanted.wait(REST_S)  # a lossy one took too long: what it looked at was skipped, and freed
                    continue
                failpoint("prefetched", entry.step)
                return ready
            if (
                self._plan.shadow
                or self._broker.call(self._queue.form, self._plan.batch_size, self._plan.policy) is None
            ):
                self._broker.call(self._queue.wait_for_group, STOP_POLL_S, after=newest)
                self._wanted.wait(REST_S)
        return None

    def _fits(self, entry: BatchEntry) -> bool:
        """Whether the batch can be trained. One of another size, or with groups that are gone, is taken apart."""
        fits = self._plan.shadow is not None or entry.n == self._plan.batch_size
        if not fits or self._broker.call(self._queue.lacks, entry.gids):
            self._broker.call(self._take_apart, entry.step)
            return False
        return True

    async def _take_apart(self, step: int) -> None:
        await self._queue.refit(self._plan.policy, apart=[step])

    def _lease(self) -> Lease | None:
        plan = self._plan
        with noticing_resets(self._plan.run, self._plan.policy):
            # as holder of the writer lock, whoever else holds a lease of this policy is gone: no need to let it lapse
            return self._broker.call(
                self._queue.lease,
                plan.policy,
                plan.replica,
                lapse_s=0,
                max_deliveries=plan.max_deliveries,
                delivered=False,  # see Publisher.deliver
            )


def fetch(broker: BlockingBroker, plan: Plan, entry: BatchEntry | LedgerEntry) -> list[Group]:
    """A step's groups, in order. Raises Conflict if they are gone."""
    try:
        return broker.call(broker.broker.queue.fetch, entry.gids)
    except LookupError as error:
        raise Conflict(
            f"step {entry.step} can't be trained: {error}. Its weights are in the checkpoint of that step or a later "
            f"one, if there is one to put back into {plan.checkpoint_dir}"
        ) from error


@contextmanager
def noticing_resets(run: str, policy: str) -> Iterator[None]:
    """Raises Conflict where Redis finds the policy to read no batches any more."""
    try:
        yield
    except ResponseError as error:
        # "no such key": of XINFO, where the reset comes between two of a look's commands
        if "NOGROUP" not in str(error) and "no such key" not in str(error):
            raise
        raise Conflict(f"run {run!r} was reset while policy {policy!r} was trained") from error

"""A policy's only trainer, as training_loop (loop.py) takes it; and how it picks up after a crash."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.steps import Lease, LedgerEntry
from lachesis.trainer.algo.rank_group import RankGroup
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.policy_lag import lag_of
from lachesis.trainer.lifecycle import RunLifecycle
from lachesis.trainer.metrics.reporter import Reporter, warn_of_untrainable
from lachesis.trainer.metrics.step import batch_metrics
from lachesis.trainer.prefetch import Prefetcher, PreparedBatch
from lachesis.trainer.writer_lock import WriterLease


@dataclass
class LeasedBatch:
    """A step in work."""

    lease: Lease
    prepared: PreparedBatch
    began: float  # time.perf_counter()
    metrics: dict[str, float] = field(default_factory=dict)  # of the learner


class SoloTrainer:
    """Holds the policy's writer lock. Call `resume`, then give it to training_loop.

    `stopping`: whether it is asked to stop; a step that has begun is finished. Any call raises LeaseLost if another
    trainer took over: the update in memory must be thrown away.
    """

    def __init__(
        self,
        broker: BlockingBroker,
        plan: Plan,
        rank_group: RankGroup,
        lifecycle: RunLifecycle,
        prefetcher: Prefetcher,
        writer_lease: WriterLease,
        reporter: Reporter,
        stopping: Callable[[], bool],
        log: BoundLogger,
    ) -> None:
        self._broker, self._plan, self._rank_group = broker, plan, rank_group
        self._lifecycle, self._publisher, self._prefetcher = lifecycle, lifecycle.publisher, prefetcher
        self._writer_lease, self._reporter, self._stopping, self._log = writer_lease, reporter, stopping, log

    @property
    def weights_step(self) -> int:
        return self._lifecycle.step

    def resume(self) -> None:
        """Bring weights, optimizer and published versions to where the ledger is, and tell environments what is trained."""
        self._lifecycle.resume(self._replay)
        self._lifecycle.register()

    def _replay(self, entry: LedgerEntry) -> None:
        prepared = self._prefetcher.load(entry)
        self._rank_group.forward_backward(prepared.groups, prepared.batch)
        self._rank_group.step()

    # -- the calls of the loop ------------------------------------------------------------------------------------

    def next_batch(self) -> LeasedBatch | None:
        if self.weights_step >= self._plan.num_steps or self._ending():
            return None
        found = self._prefetcher.next(self.weights_step, self._ending)
        return LeasedBatch(*found, began=time.perf_counter()) if found is not None else None

    def forward_backward(self, work: LeasedBatch) -> None:
        step = work.lease.batch.step
        if not self._plan.lockstep:
            self._publisher.deliver(step)
        warn_of_untrainable(self._log, step, work.prepared.untrainable)
        work.metrics |= self._rank_group.forward_backward(work.prepared.groups, work.prepared.batch)

    def step(self, work: LeasedBatch) -> LedgerEntry:
        """Updates the weights in memory before the commit: nobody else has them, and they are gone with a process that is refused."""
        work.metrics |= self._rank_group.step()
        batch, scores, version_before = work.lease.batch, work.prepared.batch.scores, self.weights_step
        failpoint("trained", batch.step)
        return LedgerEntry(
            step=batch.step,
            gids=batch.gids,
            n=batch.n,
            tok=batch.tok,
            v_before=version_before,
            v_after=batch.step,
            v_min=batch.v_min,
            lag=lag_of(batch, version_before, shadow=self._plan.shadow is not None),
            replica=self._plan.replica,
            reward=scores.mean().item() if len(scores) else 0.0,
            loss=work.metrics["loss"],
            seconds=time.perf_counter() - work.began,
        )

    def commit(self, work: LeasedBatch, entry: LedgerEntry) -> None:
        self._writer_lease.check()
        self._publisher.check()
        self._broker.call(
            self._broker.broker.queue.commit,
            self._plan.policy,
            work.lease,
            entry,
            token=self._writer_lease.token,
            untrainable=work.prepared.untrainable,
        )
        self._writer_lease.lease = None
        self._lifecycle.step = entry.step
        failpoint("committed", entry.step)

    def publish(self) -> None:
        self._lifecycle.publish_if_due()
        if self._plan.lockstep:
            self._publisher.deliver(self.weights_step, served=True)

    def save(self) -> None:
        self._lifecycle.save_if_due()

    def report(self, work: LeasedBatch, entry: LedgerEntry, seconds: dict[str, float]) -> None:
        prepared, estimated = work.prepared, self._rank_group.estimated
        values = batch_metrics(entry, prepared.groups, prepared.batch, estimated) | work.metrics | seconds
        values |= {"fetch_s": prepared.fetch_s, "map_s": prepared.map_s}
        values |= {"write_s": self._publisher.write_s, "version": self._publisher.newest}
        self._reporter.report(values, prepared.groups, prepared.batch, estimated)

    def recovery(self) -> AbstractContextManager[None, bool | None]:
        """It goes on after nothing: the process ends, and the next one resumes."""
        return nullcontext()

    def finish(self) -> None:
        """Leaves the last version and a checkpoint."""
        self._lifecycle.finish()

    def _ending(self) -> bool:
        self._publisher.check()  # a disk may be full while no batch comes
        return self._stopping()

"""The step loop of one trainer process: lease, train, commit, publish, checkpoint; and how it picks up after a crash.

A step's order is what makes every step count once. The update is committed before it is published or checkpointed, so
whatever exists outside this process is covered by the ledger; and a batch's groups are kept until a checkpoint covers
them, so a step that was committed and then lost with its process is trained again from the same groups, in the same
order, and neither committed nor published twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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


class Replica:
    """Everything a step needs, wired together by main.py. Call `resume`, then `train`."""

    def __init__(
        self,
        broker: BlockingBroker,
        plan: Plan,
        rank_group: RankGroup,
        lifecycle: RunLifecycle,
        prefetcher: Prefetcher,
        writer_lease: WriterLease,
        reporter: Reporter,
        log: BoundLogger,
    ) -> None:
        self._broker, self._plan, self._rank_group = broker, plan, rank_group
        self._lifecycle, self._publisher, self._prefetcher = lifecycle, lifecycle.publisher, prefetcher
        self._writer_lease, self._reporter, self._log = writer_lease, reporter, log

    @property
    def step(self) -> int:
        """Of the weights in memory."""
        return self._lifecycle.step

    def resume(self) -> None:
        """Bring weights, optimizer and published versions to where the ledger is, and tell environments what is trained."""
        self._lifecycle.resume(self._replay)
        self._lifecycle.register()

    def _replay(self, entry: LedgerEntry) -> None:
        ready = self._prefetcher.load(entry)
        self._rank_group.forward_backward(ready.groups, ready.batch)
        self._rank_group.step()

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, stopping: Callable[[], bool]) -> None:
        """Train until the last step, or until `stopping`; a step that has begun is finished. Leaves a checkpoint.

        Raises LeaseLost if another trainer took over: the update in memory must be thrown away.
        """

        def ending() -> bool:
            self._publisher.check()  # a disk may be full while no batch comes
            return stopping()

        mark = time.perf_counter()
        while self.step < self._plan.num_steps and not ending():
            found = self._prefetcher.next(self.step, ending)
            if found is None:
                break
            mark = self._one_step(*found, since=mark)
        self._lifecycle.finish()

    def _one_step(self, lease: Lease, ready: PreparedBatch, *, since: float) -> float:
        """`since`: when the step before this one ended, and this one's wait began. Returns when this one ended."""
        leased = time.perf_counter()
        if not self._plan.lockstep:
            self._publisher.deliver(lease.batch.step)
        warn_of_untrainable(self._log, lease.batch.step, ready.untrainable)
        learned = self._rank_group.forward_backward(ready.groups, ready.batch) | self._rank_group.step()
        version_before, step = self.step, lease.batch.step
        failpoint("trained", step)

        entry = LedgerEntry(
            step=step,
            gids=lease.batch.gids,
            n=lease.batch.n,
            tok=lease.batch.tok,
            v_before=version_before,
            v_after=step,
            v_min=lease.batch.v_min,
            lag=lag_of(lease.batch, version_before, shadow=self._plan.shadow is not None),
            replica=self._plan.replica,
            reward=ready.batch.scores.mean().item() if len(ready.batch.scores) else 0.0,
            loss=learned["loss"],
            seconds=time.perf_counter() - leased,
        )
        self._writer_lease.check()
        self._publisher.check()
        self._broker.call(
            self._broker.broker.queue.commit,
            self._plan.policy,
            lease,
            entry,
            token=self._writer_lease.token,
            untrainable=ready.untrainable,
        )
        self._writer_lease.lease = None
        self._lifecycle.step = step
        failpoint("committed", step)

        committed = time.perf_counter()
        self._lifecycle.publish_if_due()
        if self._plan.lockstep:
            self._publisher.deliver(step, served=True)
        published = time.perf_counter()
        self._lifecycle.save_if_due()
        finished = time.perf_counter()
        seconds = {
            "wait_s": leased - since,
            "fetch_s": ready.fetch_s,
            "map_s": ready.map_s,
            "publish_s": published - committed,
            "write_s": self._publisher.write_s,
            "checkpoint_s": finished - published,
            "step_s": finished - since,
        }
        estimated = self._rank_group.estimated
        values = batch_metrics(entry, ready.groups, ready.batch, estimated) | learned | seconds
        values["version"] = self._publisher.newest
        self._reporter.report(values, ready.groups, ready.batch, estimated)
        return finished

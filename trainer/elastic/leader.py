"""What the first of a policy's replicas does beside training: versions, checkpoints, what environments and people see.

Each may be done again by another replica that took over in the middle of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker
from lachesis.broker.records.groups import Group
from lachesis.broker.records.steps import BatchEntry, LedgerEntry, Membership
from lachesis.broker.replicas.members import Rendezvous
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.elastic.collectives.base import Alone
from lachesis.trainer.elastic.config import StepRecord
from lachesis.trainer.elastic.group_accumulator import GroupAccumulator
from lachesis.trainer.elastic.group_stats import decode, merge_group_stats
from lachesis.trainer.elastic.sharded_accumulator import ShardedAccumulator
from lachesis.trainer.lifecycle import RunLifecycle
from lachesis.trainer.metrics.reporter import Reporter, warn_of_untrainable
from lachesis.trainer.metrics.step import batch_metrics
from lachesis.trainer.prefetch import fetch
from lachesis.trainer.writer_lock import WriteAccess, WriterLease


class Leader:
    """Every replica has one; only the first one's publishes, saves and reports."""

    def __init__(
        self,
        broker: BlockingBroker,
        plan: Plan,
        accumulator: GroupAccumulator | ShardedAccumulator,
        mapping: Callable[[Sequence[Group]], TrainingBatch],
        membership: WriteAccess,
        reporter: Reporter,
        log: BoundLogger,
        make_lifecycle: Callable[[WriteAccess, ExitStack], RunLifecycle],
    ) -> None:
        self._broker, self._plan, self._accumulator, self._mapping = broker, plan, accumulator, mapping
        self._reporter, self._log, self._make_lifecycle = reporter, log, make_lifecycle
        self._membership, self._writer_lease = membership, None  # type: WriteAccess, WriterLease | None
        self._lifecycle: RunLifecycle | None = None
        self._parts = ExitStack()
        self._collected: tuple[list[Group], TrainingBatch, dict[str, float]] | None = None

    def check(self) -> None:
        """Raise LeaseLost if another replica is the first one by now."""
        (self._writer_lease or self._membership).check()

    def resume(self, writer_lease: WriterLease) -> int:
        """Bring the weights in memory from the newest checkpoint to the end of the ledger; the step it ends at."""
        self.resign()
        self._writer_lease = writer_lease
        try:
            lifecycle = self._begin()
            lifecycle.check_base(pristine=self._accumulator.pristine)
            lifecycle.resume(self._replay)
            lifecycle.register()
        finally:
            self._writer_lease = None
        return lifecycle.step

    def met(self, rendezvous: Rendezvous, me: Membership) -> None:
        """The replicas of an epoch know each other."""
        names = [id_.rsplit(":", 1)[0] for id_ in rendezvous.steps]
        self._log.info(
            "training together", step=rendezvous.step, replicas=len(names), first=names[0], generation=me.generation,
            epoch=me.epoch,
        )  # fmt: skip

    def opened(self, step: int) -> None:
        """The groups of a step are laid out for the replicas; called again by one that takes over."""
        if not self._plan.lockstep:
            self._taken_over(step - 1).publisher.deliver(step)

    def follow_up(self, step: int) -> None:
        """Publish and save what is due with step `step`, which is committed and in memory; all that is still missing."""
        self.publish(step)
        self.save(step)

    def publish(self, step: int) -> None:
        """The first half of `follow_up`."""
        lifecycle = self._taken_over(step)
        lifecycle.step = step
        lifecycle.publish_if_due()
        if self._plan.lockstep:
            lifecycle.publisher.deliver(step, served=True)

    def save(self, step: int) -> None:
        """The second half of it."""
        self._taken_over(step).save_if_due()

    def settle(self) -> None:
        """Before the next step may be committed: what it makes unrepeatable must be done."""
        if self._lifecycle is not None:
            self._lifecycle.announced()

    def collect(self, record: StepRecord, entry: LedgerEntry) -> None:
        """Read a step's groups for `report`, before `save` may free them; it is committed and applied."""
        began, self._collected = time.perf_counter(), None
        try:
            groups = self._broker.call(self._broker.broker.queue.fetch, entry.gids)
        except LookupError as error:
            self.check()  # who leads by now has saved, and freed them
            self._log.warning("a step's data was deleted: it is trained, and not told", step=entry.step, why=str(error))
            return
        fetched = time.perf_counter()
        batch = self._mapping(groups)
        mapped = time.perf_counter()
        warn_of_untrainable(self._log, entry.step, record.letters)
        self._collected = groups, batch, {"fetch_s": fetched - began, "map_s": mapped - fetched}

    def report(self, record: StepRecord, entry: LedgerEntry, seconds: dict[str, float]) -> None:
        """Tell of the step that was collected; nothing where its groups were gone."""
        if self._collected is None or self._lifecycle is None:
            return
        groups, batch, read = self._collected
        self._collected = None
        publisher = self._lifecycle.publisher
        estimated = merge_group_stats([decode(word) for word in record.told], entry.gids, batch)
        values = batch_metrics(entry, groups, batch, estimated) | self._accumulator.metrics | read | seconds
        values |= {
            "reduce_s": record.reduced - record.computed,
            "vote_s": record.voted - record.reduced,
            "replicas": len(record.rendezvous.steps),
            "own_groups": record.own_groups,
            "write_s": publisher.write_s,
            "version": publisher.newest,
        }
        self._reporter.report(values, groups, batch, estimated)

    def finish(self, step: int) -> None:
        """Leave what a later process goes on from; the weights in memory are those of `step`."""
        lifecycle = self._taken_over(step)
        lifecycle.step = step
        lifecycle.finish()

    def resign(self) -> None:
        """Another replica is the first one now, or this one is gone."""
        self._lifecycle, self._collected = None, None
        self._parts.close()

    def _begin(self) -> RunLifecycle:
        """Only now: what an earlier leader left half done is cleared away with it."""
        self._lifecycle = self._make_lifecycle(self, self._parts)
        return self._lifecycle

    def _taken_over(self, step: int) -> RunLifecycle:
        if self._lifecycle is None:
            self._log.info("leads: publishes and saves", step=step)
            self._begin().take_over(step)
        assert self._lifecycle is not None
        return self._lifecycle

    def _replay(self, entry: LedgerEntry) -> None:
        groups = fetch(self._broker, self._plan, entry)
        batch = BatchEntry(entry.step, entry.gids, entry.n, entry.tok, entry.v_min, entry.v_min, 0.0)
        told = self._accumulator.accumulate(batch, list(enumerate(groups)))
        sums = self._accumulator.reduce(Alone(), torch.zeros(0, dtype=torch.uint8), lambda: None)
        self._accumulator.apply(batch, sums, told)

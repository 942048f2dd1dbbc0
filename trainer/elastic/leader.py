"""What the first of a policy's replicas does beside training: versions, checkpoints, what environments and people see."""

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
    """The LeaderTasks (see config.py) of a replica with real weights, and its right to do them: `check`."""

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
        self._untold: tuple[dict[str, float], list[Group], TrainingBatch, StepRecord] | None = None

    def check(self) -> None:
        """Raise LeaseLost if another replica has these duties by now."""
        (self._writer_lease or self._membership).check()

    def resume(self, writer_lease: WriterLease) -> int:
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
        names = [id_.rsplit(":", 1)[0] for id_ in rendezvous.steps]
        self._log.info(
            "training together", step=rendezvous.step, replicas=len(names), first=names[0], generation=me.generation,
            epoch=me.epoch,
        )  # fmt: skip

    def opened(self, step: int) -> None:
        if not self._plan.lockstep:
            self._taken_over(step - 1).publisher.deliver(step)

    def follow_up(self, step: int) -> None:
        lifecycle = self._taken_over(step)
        lifecycle.step = step
        began = time.perf_counter()
        lifecycle.publish_if_due()
        if self._plan.lockstep:
            lifecycle.publisher.deliver(step, served=True)
        published = time.perf_counter()
        lifecycle.save_if_due()
        finished = time.perf_counter()
        self._tell({"publish_s": published - began, "checkpoint_s": finished - published}, lifecycle)

    def settle(self) -> None:
        if self._lifecycle is not None:
            self._lifecycle.announced()

    def report(self, trained: StepRecord) -> None:
        began = time.perf_counter()
        try:
            groups = self._broker.call(self._broker.broker.queue.fetch, trained.entry.gids)
        except LookupError as error:
            self.check()  # who leads by now has saved, and freed them
            self._log.warning(
                "a step's data was deleted: it is trained, and not told", step=trained.entry.step, why=str(error)
            )
            return
        fetched = time.perf_counter()
        batch = self._mapping(groups)
        mapped = time.perf_counter()
        warn_of_untrainable(self._log, trained.entry.step, trained.letters)
        seconds = {
            "wait_s": trained.wait_s,
            "fetch_s": fetched - began,
            "map_s": mapped - fetched,
            "reduce_s": trained.reduce_s,
            "vote_s": trained.vote_s,
            "replicas": trained.replicas,
            "own_groups": trained.groups,
        }
        self._untold = self._accumulator.metrics | seconds, groups, batch, trained

    def finish(self, step: int) -> None:
        lifecycle = self._taken_over(step)
        lifecycle.step = step
        lifecycle.finish()

    def resign(self) -> None:
        self._lifecycle, self._untold = None, None
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

    def _tell(self, seconds: dict[str, float], lifecycle: RunLifecycle) -> None:
        if self._untold is None:
            return
        learned, groups, batch, trained = self._untold
        self._untold = None
        estimated = merge_group_stats([decode(word) for word in trained.told], trained.entry.gids, batch)
        values = batch_metrics(trained.entry, groups, batch, estimated) | learned | seconds
        values |= {"write_s": lifecycle.publisher.write_s, "version": lifecycle.publisher.newest}
        values["step_s"] = time.perf_counter() - trained.since
        self._reporter.report(values, groups, batch, estimated)

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
from lachesis.broker.replicas.members import Meeting
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.elastic.collectives.base import Alone
from lachesis.trainer.elastic.config import Trained
from lachesis.trainer.elastic.group_accumulator import GroupLearner
from lachesis.trainer.elastic.group_stats import decode, whole
from lachesis.trainer.elastic.sharded_accumulator import CrewCompute
from lachesis.trainer.lifecycle import Upkeep
from lachesis.trainer.metrics.reporter import Reporter, warn_of_untrainable
from lachesis.trainer.metrics.step import batch_metrics
from lachesis.trainer.prefetch import fetch
from lachesis.trainer.writer_lock import Right, Tenure


class Lead:
    """The Duties (see config.py) of a replica with real weights, and its right to do them: `check`."""

    def __init__(
        self,
        broker: BlockingBroker,
        plan: Plan,
        compute: GroupLearner | CrewCompute,
        mapping: Callable[[Sequence[Group]], TrainingBatch],
        seat: Right,
        reporter: Reporter,
        log: BoundLogger,
        make_upkeep: Callable[[Right, ExitStack], Upkeep],
    ) -> None:
        self._broker, self._plan, self._compute, self._mapping = broker, plan, compute, mapping
        self._reporter, self._log, self._make_upkeep = reporter, log, make_upkeep
        self._seat, self._tenure = seat, None  # type: Right, Tenure | None
        self._upkeep: Upkeep | None = None
        self._parts = ExitStack()
        self._untold: tuple[dict[str, float], list[Group], TrainingBatch, Trained] | None = None

    def check(self) -> None:
        """Raise LeaseLost if another replica has these duties by now."""
        (self._tenure or self._seat).check()

    def resume(self, tenure: Tenure) -> int:
        self.resign()
        self._tenure = tenure
        try:
            upkeep = self._begin()
            upkeep.check_base(pristine=self._compute.pristine)
            upkeep.resume(self._replay)
            upkeep.register()
        finally:
            self._tenure = None
        return upkeep.step

    def met(self, meeting: Meeting, me: Membership) -> None:
        names = [id_.rsplit(":", 1)[0] for id_ in meeting.steps]
        self._log.info(
            "training together", step=meeting.step, replicas=len(names), first=names[0], generation=me.generation,
            epoch=me.epoch,
        )  # fmt: skip

    def opened(self, step: int) -> None:
        if not self._plan.lockstep:
            self._taken_over(step - 1).publisher.deliver(step)

    def follow_up(self, step: int) -> None:
        upkeep = self._taken_over(step)
        upkeep.step = step
        began = time.perf_counter()
        upkeep.publish_if_due()
        if self._plan.lockstep:
            upkeep.publisher.deliver(step, served=True)
        published = time.perf_counter()
        upkeep.save_if_due()
        finished = time.perf_counter()
        self._tell({"publish_s": published - began, "checkpoint_s": finished - published}, upkeep)

    def settle(self) -> None:
        if self._upkeep is not None:
            self._upkeep.announced()

    def report(self, trained: Trained) -> None:
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
        self._untold = self._compute.metrics | seconds, groups, batch, trained

    def finish(self, step: int) -> None:
        upkeep = self._taken_over(step)
        upkeep.step = step
        upkeep.finish()

    def resign(self) -> None:
        self._upkeep, self._untold = None, None
        self._parts.close()

    def _begin(self) -> Upkeep:
        """Only now: what an earlier leader left half done is cleared away with it."""
        self._upkeep = self._make_upkeep(self, self._parts)
        return self._upkeep

    def _taken_over(self, step: int) -> Upkeep:
        if self._upkeep is None:
            self._log.info("leads: publishes and saves", step=step)
            self._begin().take_over(step)
        assert self._upkeep is not None
        return self._upkeep

    def _replay(self, entry: LedgerEntry) -> None:
        groups = fetch(self._broker, self._plan, entry)
        batch = BatchEntry(entry.step, entry.gids, entry.n, entry.tok, entry.v_min, entry.v_min, 0.0)
        told = self._compute.accumulate(batch, list(enumerate(groups)))
        sums = self._compute.reduce(Alone(), torch.zeros(0, dtype=torch.uint8), lambda: None)
        self._compute.apply(batch, sums, told)

    def _tell(self, seconds: dict[str, float], upkeep: Upkeep) -> None:
        if self._untold is None:
            return
        learned, groups, batch, trained = self._untold
        self._untold = None
        estimated = whole([decode(word) for word in trained.told], trained.entry.gids, batch)
        values = batch_metrics(trained.entry, groups, batch, estimated) | learned | seconds
        values |= {"write_s": upkeep.publisher.write_s, "version": upkeep.publisher.newest}
        values["step_s"] = time.perf_counter() - trained.since
        self._reporter.report(values, groups, batch, estimated)

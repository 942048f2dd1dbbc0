"""What outlives a trainer's process, kept up to the weights in memory: versions, checkpoints, what environments are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker, Conflict, LeaseLost
from lachesis.broker.errors import CheckpointRefused
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.retention.shadows import Rule
from lachesis.trainer.algo.rank_group import RankGroup
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.weights.checkpoint import Checkpoints
from lachesis.trainer.weights.publisher import Publisher
from lachesis.trainer.writer_lock import WriteAccess

DONE = Rule("lossy", 1)  # of a shadow that trains no more
ANNOUNCEMENT_POLL_S = 0.002  # between two looks at whether a version is announced


class RunLifecycle:
    """Of one policy, by the one process that has the right to. `step` says which weights are in memory."""

    def __init__(
        self,
        broker: BlockingBroker,
        plan: Plan,
        rank_group: RankGroup,
        checkpoints: Checkpoints,
        publisher: Publisher,
        right: WriteAccess,
        log: BoundLogger,
    ) -> None:
        self._broker, self._plan, self._rank_group = broker, plan, rank_group
        self._checkpoints, self.publisher, self._right, self._log = checkpoints, publisher, right, log
        self.step = 0  # of the weights in memory
        self._published = -1  # newest version handed to the publisher
        self._saved = 0  # newest checkpoint
        self._refused: CheckpointRefused | None = None  # of a newer one than that

    def register(self) -> None:
        """Read batches; and tell environments what is trained, and let them begin, unless this is a shadow."""
        plan, registry = self._plan, self._broker.broker.registry
        config = TrainerConfig(
            wandb_group=plan.wandb_group,
            wandb_project=plan.wandb_project,
            batch_size=plan.batch_size,
            max_token_len=plan.max_token_len,
            checkpoint_dir=str(plan.checkpoint_dir),
            save_checkpoint_interval=plan.checkpoint_every,
            starting_step=self.step,
            num_steps=plan.num_steps,
        )
        if plan.shadow is None:
            self._broker.call(registry.register_trainer, config)
            self._broker.call(registry.start)
        if plan.kept is not None:
            self._broker.call(registry.keep_configuration, plan.policy, plan.kept)
        self._broker.call(self._broker.broker.queue.subscribe, plan.policy, plan.shadow)
        if plan.shadow is None:
            self._broker.call(self._broker.broker.queue.refit.if_due, plan.policy)
        as_what = f", a {plan.shadow.kind} shadow" if plan.shadow else ""
        self._broker.call(
            self._broker.broker.journal.control,
            "training",
            plan.replica,
            f"{plan.policy}{as_what} from step {self.step}",
        )

    # -- taking over ----------------------------------------------------------------------------------------------

    def resume(self, replay: Callable[[LedgerEntry], None]) -> None:
        """Bring weights, optimizer and published versions to where the ledger is. `replay` trains a step once more.

        Raises Conflict if the ledger, the published versions and the checkpoints can't be of one history.
        """
        policy = self._plan.policy
        ledger = self._broker.call(self._ledger)
        committed = ledger[-1].step if ledger else 0
        newest = self._broker.call(self._broker.broker.weights.newest, policy)
        self._published = newest.version if newest else -1
        if self._published > committed:
            raise Conflict(
                f"policy {policy!r} of run {self._plan.run!r} has published version {self._published}, but its ledger ends "
                f"at step {committed}: the run was reset. Train under another --run"
            )
        self._load(committed)
        self.publisher.resume(self._published)
        if self._published < 0:
            self.publish()
        for entry in ledger:
            if entry.step > self._saved:
                self._repeat(entry, replay)
                self.step = entry.step
                self._log.info("replayed", step=self.step)
                self.publish_if_due()
        self.publisher.deliver(committed)  # a process may have died before it did
        self.publisher.flush()
        self.save()  # so that crashes in a row don't make the replay longer and longer

    def check_base(self, *, pristine: bool) -> None:
        """Raise LeaseLost where there is no checkpoint to go back to and the weights in memory are not the first ones."""
        if not pristine and not self._checkpoints.steps():
            raise LeaseLost(
                f"policy {self._plan.policy!r} has to be trained anew from its first step, as {self._checkpoints.folder} holds "
                "no checkpoint, and this process has other weights by now: start it again"
            )

    def take_over(self, step: int) -> None:
        """Go on from another process, with weights in memory that are those of `step`, the end of the ledger."""
        self.step = step
        newest = self._broker.call(self._broker.broker.weights.newest, self._plan.policy)
        self._published = newest.version if newest else -1
        self._saved = max((saved for saved in self._checkpoints.steps() if saved <= step), default=0)
        self.publisher.resume(self._published)
        self.publisher.deliver(step)

    def _load(self, committed: int) -> None:
        steps = self._checkpoints.found()
        usable = [step for step in steps if step <= committed]
        beyond = [step for step in steps if step > committed]
        if beyond and not usable:
            raise Conflict(
                f"{self._checkpoints.folder} holds checkpoints of steps {', '.join(map(str, steps))}, but the ledger of policy "
                f"{self._plan.policy!r} in run {self._plan.run!r} ends at step {committed}: they are of another history. "
                "Move them away, give another lachesis.checkpoint_dir, or train under another --run"
            )
        for step in beyond:  # Redis lost its last moments: those steps will be trained anew, from other groups
            self._log.warning("checkpoint is ahead of the ledger, dropped", step=step, ledger=committed)
            self._checkpoints.remove(step)
        for step in reversed(usable):
            try:
                self._checkpoints.load(step)
            except CheckpointRefused as error:
                self._log.warning("checkpoint refused", step=step, why=str(error))
                self._refused = self._refused or error
                continue
            self.step = self._saved = step
            self._log.info("loaded checkpoint", step=self.step)
            return
        if self._refused:
            raise self._refused

    def _repeat(self, entry: LedgerEntry, replay: Callable[[LedgerEntry], None]) -> None:
        """Train a step once more. Where an older checkpoint had to do, its groups may be gone: then say why they were needed."""
        try:
            replay(entry)
        except Conflict as error:
            if self._refused is None:
                raise
            raise CheckpointRefused(
                f"{self._refused}. The checkpoint of step {self._saved} is whole, but what was trained after it is freed: "
                "put the file back as it was"
            ) from error

    async def _ledger(self) -> list[LedgerEntry]:
        return [entry async for entry in self._broker.broker.queue.ledger(self._plan.policy)]

    # -- going on -------------------------------------------------------------------------------------------------

    def publish_if_due(self) -> None:
        """Also where num_steps was lowered to where an earlier process had stopped."""
        wanted = self.step % self._plan.publish_every == 0 or self.step >= self._plan.num_steps
        if wanted and self.step > self._published:
            self.publish()

    def publish(self) -> None:
        """Copy the weights in memory and let the publisher write them."""
        self._right.check()
        with closing(self._rank_group.tensors()) as tensors:
            self.publisher.publish(self.step, self._published, tensors)
        self._published = self.step

    def announced(self) -> None:
        """Wait until the version that was handed over is announced: the weights that it needs are about to change."""
        while self.publisher.newest < self._published:
            self.publisher.check()
            time.sleep(ANNOUNCEMENT_POLL_S)

    def save_if_due(self) -> None:
        if self.step % self._plan.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        self._right.check()
        if self.step > self._saved:
            self.publisher.flush()  # a version that a crash leaves out is made from the checkpoint before it
            try:
                self._checkpoints.save(self.step)
            except (OSError, RuntimeError):  # of torch
                self._right.check()  # the one who took over cleared it away
                raise
            self._saved = self.step
        if self._saved:
            self._broker.call(self._broker.broker.queue.retire, self._plan.policy, self._saved)

    def finish(self) -> None:
        """Leave the last version and a checkpoint. For a shadow that has trained all its steps nobody waits any more."""
        self.publish_if_due()
        self.publisher.flush(hurry=True)
        self.save()
        if self._plan.shadow is not None and self.step >= self._plan.num_steps:
            self._broker.call(self._broker.broker.queue.subscribe, self._plan.policy, DONE)

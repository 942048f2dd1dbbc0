"""The step loop of one trainer process: lease, train, commit, publish, checkpoint; and how it picks up after a crash.

A step's order is what makes every step count once. The update is committed before it is published or checkpointed, so
whatever exists outside this process is covered by the ledger; and a batch's groups are kept until a checkpoint covers
them, so a step that was committed and then lost with its process is trained again from the same groups, in the same
order, and neither committed nor published twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker, Conflict
from lachesis.broker.crash import crash_point
from lachesis.broker.records import Lease, LedgerEntry, TrainerConfig
from lachesis.trainer.algo import Estimated
from lachesis.trainer.checkpoint import Checkpoints
from lachesis.trainer.configure import Plan
from lachesis.trainer.engine import Engine
from lachesis.trainer.examples import examples
from lachesis.trainer.feed import Feed, Ready
from lachesis.trainer.metrics import batch_metrics, mfu
from lachesis.trainer.publisher import Publisher
from lachesis.trainer.ranks import Crew
from lachesis.trainer.tenure import Tenure
from lachesis.trainer.tracking import Tracker


class Replica:
    """Everything a step needs, wired together by main.py. Call `resume`, then `train`."""

    def __init__(
        self,
        broker: BlockingBroker,
        plan: Plan,
        engine: Engine,
        crew: Crew,
        checkpoints: Checkpoints,
        publisher: Publisher,
        feed: Feed,
        tenure: Tenure,
        tracker: Tracker,
        log: BoundLogger,
    ) -> None:
        self._broker, self._plan, self._engine, self._crew = broker, plan, engine, crew
        self._checkpoints, self._publisher, self._feed = checkpoints, publisher, feed
        self._tenure, self._tracker, self._log = tenure, tracker, log
        self.step = 0  # of the weights in memory
        self._published = -1  # newest version handed to the publisher
        self._saved = 0  # newest checkpoint

    # -- taking over ----------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Tell environments what is trained, and let them begin."""
        plan, parties = self._plan, self._broker.broker.parties
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
        self._broker.call(parties.register_trainer, config)
        self._broker.call(parties.start)
        self._broker.call(self._broker.broker.queue.subscribe, plan.policy)
        self._broker.call(
            self._broker.broker.journal.control, "training", plan.replica, f"{plan.policy} from step {self.step}"
        )

    def resume(self) -> None:
        """Bring weights, optimizer and published versions to where the ledger is.

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
        self._publisher.resume(self._published)
        if self._published < 0:
            self._publish()
        for entry in ledger:
            if entry.step > self._saved:
                self._replay(entry)
        self._publisher.deliver(committed)  # a process may have died before it did
        self._publisher.flush()
        self._save()  # so that crashes in a row don't make the replay longer and longer

    def _load(self, committed: int) -> None:
        steps = self._checkpoints.steps()
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
        if usable:
            self._checkpoints.load(usable[-1])
            self.step = self._saved = usable[-1]
            self._log.info("loaded checkpoint", step=self.step)

    async def _ledger(self) -> list[LedgerEntry]:
        return [entry async for entry in self._broker.broker.queue.ledger(self._plan.policy)]

    def _replay(self, entry: LedgerEntry) -> None:
        ready = self._feed.load(entry)
        self._crew.step(ready.groups, ready.batch)
        self.step = entry.step
        self._log.info("replayed", step=self.step)
        if self._due():
            self._publish()

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
            found = self._feed.next(self.step, ending)
            if found is None:
                break
            mark = self._one_step(*found, since=mark)
        if self._due():  # where num_steps was lowered to where an earlier process had stopped
            self._publish()
        self._publisher.flush(hurry=True)
        self._save()

    def _one_step(self, lease: Lease, ready: Ready, *, since: float) -> float:
        """`since`: when the step before this one ended, and this one's wait began. Returns when this one ended."""
        leased = time.perf_counter()
        if not self._plan.lockstep:
            self._publisher.deliver(lease.batch.step)
        if ready.untrainable:
            first = ready.untrainable[0]
            self._log.warning(
                "sequences that can't be trained are left out: lachesis dead list",
                step=lease.batch.step,
                sequences=len(ready.untrainable),
                first=f"{first.gid}: {first.detail}",
            )
        learned = self._crew.step(ready.groups, ready.batch)
        version_before, step = self.step, lease.batch.step
        crash_point("trained", step)

        entry = LedgerEntry(
            step=step,
            gids=lease.batch.gids,
            n=lease.batch.n,
            tok=lease.batch.tok,
            v_before=version_before,
            v_after=step,
            v_min=lease.batch.v_min,
            lag=version_before - lease.batch.v_min,
            replica=self._plan.replica,
            reward=ready.batch.scores.mean().item() if len(ready.batch.scores) else 0.0,
            loss=learned["loss"],
            seconds=time.perf_counter() - leased,
        )
        self._tenure.check()
        self._publisher.check()
        self._broker.call(
            self._broker.broker.queue.commit,
            self._plan.policy,
            lease,
            entry,
            token=self._tenure.token,
            untrainable=ready.untrainable,
        )
        self._tenure.lease = None
        self.step = step
        crash_point("committed", step)

        committed = time.perf_counter()
        if self._due():
            self._publish()
        if self._plan.lockstep:
            self._publisher.deliver(step, served=True)
        published = time.perf_counter()
        if step % self._plan.checkpoint_every == 0:
            self._save()
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
        estimated = self._crew.estimated
        self._report(batch_metrics(entry, ready.groups, ready.batch, estimated) | learned | seconds, estimated)
        if self._plan.examples_every and step % self._plan.examples_every == 0:
            for values in examples(ready.groups, ready.batch, estimated, self._engine.tokenizer):
                self._broker.call(self._broker.broker.journal.metric, "example", {"step": step} | values)
        return finished

    # -- what others see ------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        wanted = self.step % self._plan.publish_every == 0 or self.step >= self._plan.num_steps
        return wanted and self.step > self._published

    def _publish(self) -> None:
        """Copy the weights in memory and let the publisher write them."""
        self._tenure.check()
        with closing(self._crew.tensors()) as tensors:
            self._publisher.publish(self.step, self._published, tensors)
        self._published = self.step

    def _save(self) -> None:
        self._tenure.check()
        if self.step > self._saved:
            self._publisher.flush()  # a version that a crash leaves out is made from the checkpoint before it
            self._checkpoints.save(self.step)
            self._saved = self.step
        if self._saved:
            self._broker.call(self._broker.broker.queue.retire, self._plan.policy, self._saved)

    def _report(self, values: dict[str, float], estimated: Estimated | None) -> None:
        values["queue"] = self._broker.call(self._broker.broker.queue.status).groups
        values["num_steps"], values["version"] = self._plan.num_steps, self._publisher.newest
        values["wait_share"] = values["wait_s"] / values["step_s"]
        values["tokens_per_s"] = values["tokens"] / values["step_s"]
        if estimated is not None and self._engine.flops_counter is not None:
            values["perf/mfu/actor"] = mfu(self._engine.flops_counter, estimated.batch, values["train_s"])
        self._broker.call(self._broker.broker.journal.metric, "step", values)
        self._tracker.log(self.step, values)
        shown = ("step", "reward", "loss", "grad_norm", "lag", "queue", "wait_s", "step_s")
        self._log.info("trained", **{name: round(values[name], 4) for name in shown})

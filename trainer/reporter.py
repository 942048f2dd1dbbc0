"""What others see of a step: the run's metrics, the tracker, examples, one line of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker
from lachesis.broker.records import DeadEntry, Group
from lachesis.trainer.configure import Plan
from lachesis.trainer.engine import Engine
from lachesis.trainer.examples import examples
from lachesis.trainer.metrics import mfu
from lachesis.trainer.tracking import Tracker

if TYPE_CHECKING:
    from lachesis.trainer.algo import Estimated
    from lachesis.trainer.batch import TrainingBatch


class Reporter:
    """Tells of a step once it is done."""

    def __init__(self, broker: BlockingBroker, plan: Plan, engine: Engine, tracker: Tracker, log: BoundLogger) -> None:
        self._broker, self._plan, self._engine, self._tracker, self._log = broker, plan, engine, tracker, log

    def report(
        self, values: dict[str, float], groups: Sequence[Group], batch: TrainingBatch, estimated: Estimated | None
    ) -> None:
        """`values`: of the step, with wait_s, step_s and train_s, and the newest version as `version`."""
        step, plan, journal = int(values["step"]), self._plan, self._broker.broker.journal
        values["queue"] = self._broker.call(self._broker.broker.queue.status).groups
        values["num_steps"] = plan.num_steps
        values["wait_share"] = values["wait_s"] / values["step_s"]
        values["tokens_per_s"] = values["tokens"] / values["step_s"]
        if estimated is not None and self._engine.flops_counter is not None:
            values["perf/mfu/actor"] = mfu(self._engine.flops_counter, estimated.batch, values["train_s"])
        kind = "step" if plan.shadow is None else "shadow"
        self._broker.call(journal.metric, kind, {"policy": plan.policy, **values})
        self._tracker.log(step, values)
        shown = ("step", "reward", "loss", "grad_norm", "lag", "queue", "wait_s", "step_s")
        self._log.info("trained", **{name: round(values[name], 4) for name in shown})
        if plan.shadow is None and plan.examples_every and step % plan.examples_every == 0:
            for example in examples(groups, batch, estimated, self._engine.tokenizer):
                self._broker.call(journal.metric, "example", {"step": step} | example)


def warn_of_untrainable(log: BoundLogger, step: int, letters: Sequence[DeadEntry]) -> None:
    if letters:
        log.warning(
            "sequences that can't be trained are left out: lachesis dead list",
            step=step,
            sequences=len(letters),
            first=f"{letters[0].gid}: {letters[0].detail}",
        )

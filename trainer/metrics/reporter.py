"""What others see of a step: the run's metrics, the tracker, examples, one line of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker
from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.engine.verl_engine import Engine
from lachesis.trainer.metrics.samples import examples
from lachesis.trainer.metrics.step import env_name, env_scores, evaluation, mfu
from lachesis.trainer.metrics.tracker import Tracker

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Estimated
    from lachesis.trainer.data.batch import TrainingBatch


class Reporter:
    """Tells of a step once it is done."""

    def __init__(self, broker: BlockingBroker, plan: Plan, engine: Engine, tracker: Tracker, log: BoundLogger) -> None:
        self._broker, self._plan, self._engine, self._tracker, self._log = broker, plan, engine, tracker, log
        self._env_names: dict[int, str] = {}
        self._read_to = ""  # of the metrics, for evaluations to pass on to the tracker

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
        self._learn_names(groups)
        values |= env_scores(groups, self._env_names)
        evaluated = self._evaluations() if self._tracker.active else {}
        kind = "step" if plan.shadow is None else "shadow"
        self._broker.call(journal.metric, kind, {"policy": plan.policy, **values})
        self._tracker.log(step, values | evaluated)
        shown = ("step", "reward", "loss", "grad_norm", "lag", "queue", "wait_s", "step_s")
        self._log.info("trained", **{name: round(values[name], 4) for name in shown})
        if plan.shadow is None and plan.examples_every and step % plan.examples_every == 0:
            name_of = {group.gid: env_name(group, self._env_names) for group in groups}
            for example in examples(groups, batch, estimated, self._engine.tokenizer):
                named = {"step": step, "env_name": name_of[example["gid"]]}
                self._broker.call(journal.metric, "example", named | example)

    def _learn_names(self, groups: Sequence[Group]) -> None:
        unknown = {group.env for group in groups if group.env is not None} - self._env_names.keys()
        if unknown:
            envs = self._broker.call(self._broker.broker.registry.envs)
            self._env_names = dict.fromkeys(unknown, "") | {env.env_id: env.config.desired_name for env in envs}

    def _evaluations(self) -> dict[str, float]:
        """The newest one since the step before, by whoever told of that."""
        journal, found = self._broker.broker.journal, {}
        if not self._read_to:
            _, steps = self._broker.call(journal.newest, 1, {"step"})
            self._read_to = steps[0][0] if steps else "0-0"
        while entries := self._broker.call(journal.metrics, self._read_to):
            self._read_to = entries[-1][0]
            for _, fields in entries:
                if fields.get("kind") == "eval" and {"accuracy", "version"} <= fields.keys():
                    found = evaluation(fields)
        return found


def warn_of_untrainable(log: BoundLogger, step: int, letters: Sequence[DeadEntry]) -> None:
    if letters:
        log.warning(
            "sequences that can't be trained are left out: lachesis dead list",
            step=step,
            sequences=len(letters),
            first=f"{letters[0].gid}: {letters[0].detail}",
        )

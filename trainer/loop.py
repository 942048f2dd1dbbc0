"""The training loop: next batch, forward and backward, step, commit, publish, save; for one trainer or one of several replicas.

A step's order is what makes every step count once. It is committed before it is published or checkpointed, so whatever
exists outside this process is covered by the ledger; and a batch's groups are kept until a checkpoint covers them, so a
step that was committed and then lost with its process is trained again from the same groups, in the same order, and
neither committed nor published twice.

When the weights change, relative to the commit, is each trainer's own: see `step` of solo.py, `commit` of elastic/replica.py.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from lachesis.broker.records.steps import LedgerEntry

Work = TypeVar("Work")  # a step in work: its batch, and what the trainer keeps of it from call to call


class Trainer(Protocol[Work]):
    """What a step needs; build.py makes one."""

    @property
    def weights_step(self) -> int:
        """The step that the weights in memory are of."""

    def next_batch(self) -> Work | None:
        """Wait for the next batch and take it; None after the last step, or when asked to stop."""

    def forward_backward(self, work: Work) -> None:
        """Compute the gradients of the batch's loss."""

    def step(self, work: Work) -> LedgerEntry:
        """Make the step of them, as far as that can be done before its commit. Returns what the ledger is to say."""

    def commit(self, work: Work, entry: LedgerEntry) -> None:
        """Write the step to the ledger and acknowledge its batch, at once or not at all. The weights in memory are the step's then.

        Raises LeaseLost if another trainer has the batch, or the policy, by now.
        """

    def publish(self) -> None:
        """Hand the weights in memory over for the inference servers, where that is due."""

    def save(self) -> None:
        """Save a checkpoint, where that is due, and free the batches that it covers."""

    def report(self, work: Work, entry: LedgerEntry, seconds: dict[str, float]) -> None:
        """Tell what came of the step. `seconds`: wait_s, publish_s, checkpoint_s, and step_s from the end of the step before."""

    def recovery(self) -> AbstractContextManager[None, bool | None]:
        """Surrounds a step: what this trainer can go on after, it takes care of, and the loop asks for the next batch."""

    def finish(self) -> None:
        """Leave what a later process goes on from."""


def training_loop(trainer: Trainer[Work]) -> None:
    """Train until there is no next batch."""
    ended = time.perf_counter()
    while True:
        with trainer.recovery():
            work = trainer.next_batch()
            if work is None:
                break
            began = time.perf_counter()
            trainer.forward_backward(work)
            entry = trainer.step(work)
            trainer.commit(work, entry)
            committed = time.perf_counter()
            trainer.publish()
            published = time.perf_counter()
            trainer.save()
            saved = time.perf_counter()
            seconds = {
                "wait_s": began - ended,
                "publish_s": published - committed,
                "checkpoint_s": saved - published,
                "step_s": saved - ended,
            }
            ended = saved
            trainer.report(work, entry, seconds)
    trainer.finish()

"""One trainer's ranks in step: rank 0 leads, it alone knows Redis and the disk; the others do as it does."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from enum import Enum, auto
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lachesis.broker.errors import CheckpointRefused, LachesisError
from lachesis.broker.records.groups import Group

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Estimated, Learner
    from lachesis.trainer.data.batch import TrainingBatch
    from lachesis.trainer.engine.verl_engine import Engine


class Command(Enum):
    """What rank 0 has the others do."""

    FORWARD_BACKWARD = auto()
    STEP = auto()
    SAVE_CHECKPOINT = auto()
    LOAD_CHECKPOINT = auto()
    TENSORS = auto()
    DISMISS = auto()


class RankGroup:
    """What the ranks do together: `with RankGroup(…) as rank_group` on rank 0, where every method has the others do the same.

    They `follow` until the end of that block. If it ends by an error they may be in the midst of something, where no
    order reaches them: then they notice that rank 0 is gone, when its process ends.
    """

    def __init__(self, engine: Engine, learner: Learner) -> None:
        self._engine, self._learner, self._ranks = engine, learner, engine.ranks

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._ranks.order(Command.DISMISS)

    def forward_backward(self, groups: Sequence[Group], batch: TrainingBatch) -> dict[str, float]:
        """Compute the gradients of one batch; `batch` is made of `groups`. Returns Learner.forward_backward's metrics."""
        self._ranks.order(Command.FORWARD_BACKWARD, list(groups))
        return self._learner.forward_backward(batch)

    def step(self) -> dict[str, float]:
        """Make the optimizer step of them. Returns Learner.optimizer_step's metrics."""
        self._ranks.order(Command.STEP)
        return self._learner.optimizer_step()

    @property
    def estimated(self) -> Estimated | None:
        """Of the newest step (see Learner)."""
        return self._learner.estimated

    def save_checkpoint(self, path: str, *args: Any) -> None:
        """verl's, with its arguments: every rank writes its shard."""
        self._ranks.order(Command.SAVE_CHECKPOINT, path, *args)
        self._engine.worker.save_checkpoint(path, *args)

    def load_checkpoint(self, path: str, *args: Any) -> None:
        """verl's, with its arguments. Raises CheckpointRefused for what can't be loaded, as what is no tensor."""
        self._ranks.order(Command.LOAD_CHECKPOINT, path, *args)
        try:
            self._engine.worker.load_checkpoint(path, *args)
        except (LachesisError, OSError):
            raise
        except Exception as error:  # whatever a file may hold that is no checkpoint of this model
            raise CheckpointRefused(
                f"{path!r} can't be loaded: only tensors and plain values are, of the model that is trained ({_reason(error)})"
            ) from None

    def tensors(self) -> Generator[tuple[str, Tensor]]:
        """The weights in memory, whole, under Hugging Face's names. Close it where not all are taken: the others give all."""
        from lachesis.trainer.engine.export import published_tensors

        self._ranks.order(Command.TENSORS)
        found = published_tensors(self._engine)
        try:
            for name, tensor in found:  # noqa: UP028  `yield from` would close it
                yield name, tensor
        finally:
            for _ in found:
                pass

    def follow(
        self,
        to_batch: Callable[[Sequence[Group]], TrainingBatch],
        follow_other: Callable[[Enum, tuple[Any, ...]], None] | None = None,
    ) -> None:
        """Do what rank 0 does until it dismisses. `to_batch` maps groups as rank 0 maps them.

        `follow_other` gets the commands that are none of Command, with their arguments.
        """
        while True:
            command, args = self._ranks.next_order()
            match command:
                case Command.FORWARD_BACKWARD:
                    self._learner.forward_backward(to_batch(*args))
                case Command.STEP:
                    self._learner.optimizer_step()
                case Command.SAVE_CHECKPOINT:
                    self.save_checkpoint(*args)
                case Command.LOAD_CHECKPOINT:
                    self.load_checkpoint(*args)
                case Command.TENSORS:
                    for _ in self.tensors():
                        pass
                case Command.DISMISS:
                    return
                case _:
                    assert follow_other is not None, command
                    follow_other(command, args)


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong; the others advise to load it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Trying to load", "Unsupported"))]
    return (telling or lines or [type(error).__name__])[0][:300]

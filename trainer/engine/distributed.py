"""One trainer over several processes. Rank 0 leads: it alone knows Redis and the disk; the others do as it does.

torchrun or Ray starts the processes and sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. What a rank computes with the
others, verl's engine does: parameters are sharded over them, gradients summed. Here is only what keeps them in step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lachesis.broker.errors import CheckpointRefused, LachesisError
from lachesis.broker.records.groups import Group

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Estimated, Learner
    from lachesis.trainer.data.batch import TrainingBatch
    from lachesis.trainer.engine.verl_engine import Engine

# ranks wait for the leader's next order, and it waits for rollouts; a dead peer shows at once
IDLE = timedelta(days=30)
LEADER = 0


def rank_of_this_process() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this trainer, as its launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """The processes of one trainer, once torch.distributed knows them. Values travel over gloo, in host memory."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=IDLE) if self.size > 1 else None

    def order(self, name: str, *args: Any) -> None:
        """Rank 0 tells the others what comes next."""
        if self._control is not None and self.rank == LEADER:
            dist.broadcast_object_list([name, args], src=LEADER, group=self._control)

    def next_order(self) -> tuple[str, tuple[Any, ...]]:
        """What rank 0 told; blocks. Raises RuntimeError if it is gone."""
        told: list[Any] = [None, None]
        dist.broadcast_object_list(told, src=LEADER, group=self._control)
        return told[0], told[1]

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks, of a tensor in host memory; in place."""
        if self._control is not None:
            dist.all_reduce(values, group=self._control)
        return values


class Crew:
    """What the ranks do together: `with Crew(…) as crew` on rank 0, where every method has the others do the same.

    They `follow` until the end of that block. If it ends by an error they may be in the midst of something, where no
    order reaches them: then they notice that rank 0 is gone, when its process ends.
    """

    def __init__(self, engine: Engine, learner: Learner) -> None:
        self._engine, self._learner, self._ranks = engine, learner, engine.ranks

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._ranks.order("dismiss")

    def step(self, groups: Sequence[Group], batch: TrainingBatch) -> dict[str, float]:
        """Train one batch; `batch` is made of `groups`. Returns the metrics of Learner.step."""
        self._ranks.order("step", list(groups))
        return self._learner.step(batch)

    @property
    def estimated(self) -> Estimated | None:
        """Of the newest step (see Learner)."""
        return self._learner.estimated

    def save_checkpoint(self, path: str, *args: Any) -> None:
        """verl's, with its arguments: every rank writes its shard."""
        self._ranks.order("save_checkpoint", path, *args)
        self._engine.worker.save_checkpoint(path, *args)

    def load_checkpoint(self, path: str, *args: Any) -> None:
        """verl's, with its arguments. Raises CheckpointRefused for what can't be loaded, as what is no tensor."""
        self._ranks.order("load_checkpoint", path, *args)
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
        from lachesis.trainer.engine.verl_engine import published_tensors

        self._ranks.order("tensors")
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
        orders: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        """Do what rank 0 does until it dismisses. `to_batch` maps groups as rank 0 maps them; `orders`: what else there is."""
        while True:
            name, args = self._ranks.next_order()
            if name == "dismiss":
                return
            if name in orders:
                orders[name](*args)
            elif name == "step":
                self._learner.step(to_batch(args[0]))
            elif name == "tensors":
                for _ in self.tensors():
                    pass
            else:
                getattr(self, name)(*args)


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong; the others advise to load it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Trying to load", "Unsupported"))]
    return (telling or lines or [type(error).__name__])[0][:300]


def share(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split rows over `parts` ranks: as many rows each, up to one, and about as many tokens; verl's balancing.

    Args:
        lengths: tokens of each row.
    """
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    missing = -len(lengths) % parts
    found = get_seqlen_balanced_partitions([*lengths, *[0] * missing], k_partitions=parts, equal_size=True)
    return [sorted(row for row in part if row < len(lengths)) for part in found]


def init_process_group(device: str, backend: str) -> None:
    """Join the trainer's world, unless that is done already."""
    if dist.is_initialized():
        return
    if device != "cpu":
        getattr(torch, device).set_device(int(os.environ.get("LOCAL_RANK", "0")))
    named = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{backend}"
    if world_size() > 1:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # torchrun keeps its store when it starts the ranks again; in it lie the addresses of those that died
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
        dist.init_process_group(named, store=store, rank=rank, world_size=size)
    else:  # verl would ask for a port, which one process can do without
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs forget it
        dist.init_process_group(named, store=store, rank=0, world_size=1)

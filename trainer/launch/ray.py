"""One trainer as a Ray worker group: its ranks are actors, on one node or many, that run what `lachesis trainer` runs.

This process only asks Ray for them and waits. verl's worker group places them, a node's ranks together, and tells each
which rank it is and where to meet the others.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import ray
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from lachesis.broker.errors import ConfigurationError, LachesisError
from lachesis.trainer.config.compose import compose_config
from lachesis.trainer.config.plan import make_plan
from lachesis.trainer.engine.verl_engine import device_name
from lachesis.trainer.settings import TrainerSettings


class TrainerRank(Worker):
    """One rank. `train` runs in one of the actor's threads, so that `stop` can be called meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._stop = threading.Event()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)  # type: ignore[untyped-decorator]
    def train(self, settings: dict[str, Any]) -> int:
        from lachesis.trainer.build import train

        told = TrainerSettings(**settings)
        config = compose_config(told.overrides, device=device_name())
        return train(config, make_plan(config, told), told, self._stop)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        self._stop.set()


def run_on_ray(settings: TrainerSettings, device: str) -> int:
    """Train with `settings.ray_ranks` ranks, and return rank 0's exit code. Joins the cluster of RAY_ADDRESS, or starts one."""
    ranks, each_node = settings.ray_ranks, settings.ray_ranks_per_node or settings.ray_ranks
    if ranks % each_node:
        raise ConfigurationError(
            f"ray_ranks_per_node = {each_node}: must divide ray_ranks = {ranks}, or the ranks can't be spread evenly"
        )
    ray.init(ignore_reinit_error=True, log_to_driver=True)
    resource = "CPU" if device == "cpu" else "GPU"
    if ray.cluster_resources().get(resource, 0) < ranks:
        has = ray.cluster_resources().get(resource, 0)
        raise ConfigurationError(
            f"ray_ranks = {ranks}: the Ray cluster has {has:.0f} {resource}s, and each rank takes one"
        )
    pool = RayResourcePool(
        process_on_nodes=[each_node] * (ranks // each_node), use_gpu=device != "cpu", max_colocate_count=1
    )
    actor = RayClassWithInitArgs(cls=ray.remote(TrainerRank))
    actor.update_options({"max_concurrency": 2})
    group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=actor, device_name=device)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: group.stop())
    pending = group.train(settings.model_dump() | {"ray_ranks": 0})
    leader = pending[0]
    try:
        while pending:  # whichever fails first: the others may wait for it
            [done], pending = ray.wait(pending)
            ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LachesisError):
            raise error.cause from None
        raise
    return int(ray.get(leader))

"""`lachesis trainer`: checks, then wires the parts of one trainer process and runs them."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

from lachesis.trainer.build import train
from lachesis.trainer.config.compose import compose_config, resolved
from lachesis.trainer.config.like_run import like_run
from lachesis.trainer.config.plan import make_plan
from lachesis.trainer.engine.verl_engine import device_name
from lachesis.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    pass


def run(settings: TrainerSettings) -> int:
    """Train until the last step or SIGTERM/SIGINT, and return 0. Blocks.

    Raises LachesisError with one line for what a user can put right, and LeaseLost if another trainer took over.
    """
    if settings.like_run:
        settings = like_run(settings)
    config = compose_config(settings.overrides, device=device_name())
    if settings.cfg and not config.actor_rollout_ref.model.path:  # what there is to choose can be seen without a model
        print(resolved(config), end="")
        return 0
    plan = make_plan(config, settings)
    if settings.cfg:
        print(resolved(config), end="")
        return 0
    if settings.ray_ranks:
        from lachesis.trainer.launch.ray import run_on_ray

        return run_on_ray(settings, config.lachesis.device)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return train(config, plan, settings, stop)

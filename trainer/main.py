"""`lachesis trainer`: checks, then wires the parts of one trainer process and runs them."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lachesis.broker import connect_blocking
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.logs import configure_logging
from lachesis.trainer.configure import Plan, compose_config, make_plan
from lachesis.trainer.engine import build_engine, device_name
from lachesis.trainer.mapping import to_batch
from lachesis.trainer.ranks import LEADER, Crew, rank_of_this_process, world_size
from lachesis.trainer.settings import TrainerSettings
from lachesis.trainer.tenure import Tenure


def run(settings: TrainerSettings) -> int:
    """Train until the last step or SIGTERM/SIGINT, and return 0. Blocks.

    Raises LachesisError with one line for what a user can put right, and LeaseLost if another trainer took over.
    """
    config, plan = prepare(settings)
    if settings.print_config:
        print(OmegaConf.to_yaml(_in_force(config), resolve=True), end="")
        return 0
    if settings.ray_ranks:
        from lachesis.trainer.ray_group import run_on_ray

        return run_on_ray(settings, config.lachesis.device)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return train(config, plan, settings, stop)


def prepare(settings: TrainerSettings) -> tuple[DictConfig, Plan]:
    """The configuration, checked."""
    config = compose_config(settings.overrides, device=device_name())
    return config, make_plan(config, settings)


def train(config: DictConfig, plan: Plan, settings: TrainerSettings, stop: threading.Event) -> int:
    """Train in this process, as the rank that its environment says, until the last step or until `stop` is set."""
    if rank_of_this_process() != LEADER:
        return _follow(config, plan, settings)
    for folder in (plan.weights_dir, plan.checkpoint_dir):
        _make(folder)
    log = configure_logging("trainer").bind(run=plan.run, policy=plan.policy)

    with settings.redis() as url, connect_blocking(url, plan.run) as broker:
        if settings.dry_run:
            build_engine(config)
            log.info("dry run: all is well", model=str(plan.model_dir), device=config.lachesis.device)
            return 0
        with Tenure(broker, plan.policy, ttl_s=plan.lease_s) as tenure:
            engine = build_engine(config)
            # these need verl, which build_engine has imported for the right platform
            from lachesis.trainer.algo import Learner
            from lachesis.trainer.checkpoint import Checkpoints
            from lachesis.trainer.replica import Replica
            from lachesis.trainer.versions import VersionStore

            with Crew(engine, Learner(engine, config.algorithm)) as crew:
                if not tenure.wait(
                    unless=stop.is_set, on_standby=lambda: log.info("standby: another trainer holds this policy")
                ):
                    return 0
                replica = Replica(
                    broker=broker,
                    plan=plan,
                    engine=engine,
                    crew=crew,
                    checkpoints=Checkpoints(plan.checkpoint_dir, crew),
                    versions=VersionStore(plan.weights_dir, plan.model_dir, dtype=plan.weights_dtype),
                    tenure=tenure,
                    log=log,
                )
                replica.resume()
                replica.register()
                log.info("training", step=replica.step, num_steps=plan.num_steps, ranks=world_size())
                replica.train(stop.is_set)
                log.info("stopped" if replica.step < plan.num_steps else "finished", step=replica.step)
    return 0


def _follow(config: DictConfig, plan: Plan, settings: TrainerSettings) -> int:
    """A rank that is not the leader: it needs neither Redis nor signals, and ends when the leader says so."""
    engine = build_engine(config)
    if not settings.dry_run:
        from lachesis.trainer.algo import Learner

        learner = Learner(engine, config.algorithm)
        mapped = partial(
            to_batch,
            vocab_size=engine.vocab_size,
            max_tokens=plan.max_token_len,
            temperature=plan.temperature,
            compares=learner.compares,
            distills=learner.distills,
        )
        Crew(engine, learner).follow(mapped)
    return 0


def _in_force(config: DictConfig) -> DictConfig:
    """The nodes that are read."""
    model, actor, ref, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "ref", "rollout"))
    theirs = {"model": model, "actor": actor, "ref": ref, "rollout": {"temperature": rollout.temperature}}
    distillation = {name: config.distillation[name] for name in ("enabled", "distillation_loss")}
    nodes = {"actor_rollout_ref": theirs, "algorithm": config.algorithm, "distillation": distillation}
    return OmegaConf.create({"lachesis": config.lachesis, **nodes})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: can't be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(f"{folder}: not writable")

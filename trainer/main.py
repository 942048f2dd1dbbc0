"""`lachesis trainer`: checks, then wires the parts of one trainer process and runs them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lachesis.broker import connect_blocking
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.logs import configure_logging
from lachesis.trainer.configure import Plan, compose_config, make_plan
from lachesis.trainer.engine import build_engine, device_name
from lachesis.trainer.settings import TrainerSettings
from lachesis.trainer.tenure import Tenure
from lachesis.trainer.tracking import Tracker


def run(settings: TrainerSettings) -> int:
    """Train until the last step or SIGTERM/SIGINT, and return 0. Blocks.

    Raises LachesisError with one line for what a user can put right, and LeaseLost if another trainer took over.
    """
    config = compose_config(settings.overrides, device=device_name())
    if settings.cfg and not config.actor_rollout_ref.model.path:  # what there is to choose can be seen without a model
        print(_resolved(config), end="")
        return 0
    plan = make_plan(config, settings)
    if settings.cfg:
        print(_resolved(config), end="")
        return 0
    for folder in (plan.weights_dir, plan.checkpoint_dir):
        _make(folder)
    log = configure_logging("trainer").bind(run=plan.run, policy=plan.policy)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    with settings.redis() as url, connect_blocking(url, plan.run) as broker:
        if settings.dry_run:
            build_engine(config)
            written = settings.state_dir.absolute() / "runs" / plan.run / f"trainer-{plan.policy}.yaml"
            _make(written.parent)
            written.write_text(_resolved(config))
            log.info(
                "dry run: all is well", config=str(written), model=str(plan.model_dir), device=config.lachesis.device
            )
            return 0
        with Tenure(broker, plan.policy, ttl_s=plan.lease_s) as tenure:
            engine = build_engine(config)
            # these need verl, which build_engine has imported for the right platform
            from lachesis.trainer.algo import Learner
            from lachesis.trainer.checkpoint import Checkpoints
            from lachesis.trainer.feed import Feed
            from lachesis.trainer.publisher import Publisher
            from lachesis.trainer.replica import Replica
            from lachesis.trainer.versions import VersionStore

            if not tenure.wait(
                unless=stop.is_set, on_standby=lambda: log.info("standby: another trainer holds this policy")
            ):
                return 0
            versions = VersionStore(plan.weights_dir, plan.model_dir, dtype=plan.weights_dtype)
            checkpoints = Checkpoints(plan.checkpoint_dir, engine.worker)
            with (
                Publisher(broker, plan.policy, versions, tenure, keep_versions=plan.keep_versions) as publisher,
                Feed(broker, plan, tenure, vocab_size=engine.vocab_size) as feed,
                _tracker(plan, config) as tracker,
            ):
                replica = Replica(
                    broker=broker,
                    plan=plan,
                    engine=engine,
                    learner=Learner(engine, config.algorithm),
                    checkpoints=checkpoints,
                    publisher=publisher,
                    feed=feed,
                    tenure=tenure,
                    tracker=tracker,
                    log=log,
                )
                replica.resume()
                replica.register()
                log.info("training", step=replica.step, num_steps=plan.num_steps, batch_size=plan.batch_size)
                replica.train(stop.is_set)
            log.info("stopped" if replica.step < plan.num_steps else "finished", step=replica.step)
    return 0


def _tracker(plan: Plan, config: DictConfig) -> Tracker:
    told = OmegaConf.to_container(_in_force(config), resolve=True)
    assert isinstance(told, dict)
    return Tracker(
        plan.tracking,
        project=plan.wandb_project,
        name=f"{plan.wandb_group}-{plan.policy}",
        folder=plan.tracking_dir,
        config={str(node): values for node, values in told.items()} | {"trainer": {}},  # verl looks for a proxy there
    )


def _in_force(config: DictConfig) -> DictConfig:
    """The nodes that are read."""
    model, actor, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "rollout"))
    theirs = {"model": model, "actor": actor, "rollout": {"temperature": rollout.temperature}}
    return OmegaConf.create({"lachesis": config.lachesis, "actor_rollout_ref": theirs, "algorithm": config.algorithm})


def _resolved(config: DictConfig) -> str:
    return OmegaConf.to_yaml(_in_force(config), resolve=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: can't be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(f"{folder}: not writable")

"""Wires the parts of one trainer process and runs them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker, connect_blocking
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.groups import Group
from lachesis.service.logs import configure_logging
from lachesis.trainer.algo.rank_group import RankGroup
from lachesis.trainer.config.algorithms import summed_loss
from lachesis.trainer.config.compose import resolved
from lachesis.trainer.config.like_run import kept_configuration
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.data.collate import to_batch
from lachesis.trainer.engine.distributed import LEADER, rank_of_this_process, world_size
from lachesis.trainer.engine.verl_engine import Engine, build_engine
from lachesis.trainer.metrics.tracker import Tracker, open_tracker
from lachesis.trainer.settings import TrainerSettings
from lachesis.trainer.writer_lock import WriterLease

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Learner


def train(config: DictConfig, plan: Plan, settings: TrainerSettings, stop: threading.Event) -> int:
    """Train in this process, as the rank that its environment says, until the last step or until `stop` is set."""
    if rank_of_this_process() != LEADER:
        return _follow(config, plan, settings)
    for folder in (plan.weights_dir, plan.checkpoint_dir):
        _make(folder)
    log = configure_logging("trainer").bind(run=plan.run, policy=plan.policy)
    plan = replace(plan, kept=kept_configuration(settings, config))
    if plan.weights_url:
        from lachesis.trainer.weights.remote import RemoteVersions

        RemoteVersions(plan.weights_url, log).make()

    with settings.redis() as url, connect_blocking(url, plan.run) as broker:
        if settings.dry_run:
            build_engine(config)
            written = settings.state_dir.absolute() / "runs" / plan.run / f"trainer-{plan.policy}.yaml"
            _make(written.parent)
            written.write_text(resolved(config))
            log.info(
                "dry run: all is well", config=str(written), model=str(plan.model_dir), device=config.lachesis.device
            )
            return 0
        if plan.elastic:
            return _train_together(config, plan, broker, stop, log)
        with WriterLease(broker, plan.policy, ttl_s=plan.lease_s) as writer_lease, ExitStack() as parts:
            engine = build_engine(config)
            # these need verl, which build_engine has imported for the right platform
            from lachesis.trainer.algo.learner import Learner
            from lachesis.trainer.lifecycle import RunLifecycle
            from lachesis.trainer.loop import Replica
            from lachesis.trainer.metrics.reporter import Reporter
            from lachesis.trainer.prefetch import Prefetcher
            from lachesis.trainer.weights.checkpoint import make_checkpoints
            from lachesis.trainer.weights.publisher import make_publisher

            learner = Learner(engine, config.algorithm)
            rank_group = parts.enter_context(RankGroup(engine, learner))
            if not writer_lease.wait(
                unless=stop.is_set, on_standby=lambda: log.info("standby: another trainer holds this policy")
            ):
                return 0
            publisher = parts.enter_context(make_publisher(broker, plan, writer_lease, log))
            checkpoints = make_checkpoints(plan, rank_group, broker)
            prefetcher = parts.enter_context(Prefetcher(broker, plan, writer_lease, _mapping(plan, engine, learner)))
            tracker = parts.enter_context(_tracker(plan, config))
            replica = Replica(
                broker=broker,
                plan=plan,
                rank_group=rank_group,
                lifecycle=RunLifecycle(broker, plan, rank_group, checkpoints, publisher, writer_lease, log),
                prefetcher=prefetcher,
                writer_lease=writer_lease,
                reporter=Reporter(broker, plan, engine, tracker, log),
                log=log,
            )
            replica.resume()
            log.info("training", step=replica.step, num_steps=plan.num_steps, ranks=world_size())
            replica.train(stop.is_set)
        log.info("stopped" if replica.step < plan.num_steps else "finished", step=replica.step)
    return 0


def _train_together(
    config: DictConfig, plan: Plan, broker: BlockingBroker, stop: threading.Event, log: BoundLogger
) -> int:
    """As one of several replicas of the policy."""
    config, divide_by = summed_loss(config)
    engine = build_engine(config)
    from lachesis.trainer.elastic.build import train_together
    from lachesis.trainer.metrics.reporter import Reporter

    with _tracker(plan, config) as tracker:
        step = train_together(
            broker=broker,
            plan=plan,
            engine=engine,
            algorithm=config.algorithm,
            divide_by=divide_by,
            mapping=partial(_mapping, plan),
            reporter=Reporter(broker, plan, engine, tracker, log),
            stop=stop,
            log=log,
        )
    log.info("stopped" if step < plan.num_steps else "finished", step=step)
    return 0


def _follow(config: DictConfig, plan: Plan, settings: TrainerSettings) -> int:
    """A rank that is not the leader: it needs no signals, and ends when the leader says so."""
    divide_by = ""
    if plan.elastic:
        config, divide_by = summed_loss(config)
    engine = build_engine(config)
    if settings.dry_run:
        return 0
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.elastic.build import follow_together

    if plan.elastic:
        follow_together(
            plan=plan,
            engine=engine,
            algorithm=config.algorithm,
            divide_by=divide_by,
            mapping=partial(_mapping, plan),
        )
    else:
        learner = Learner(engine, config.algorithm)
        RankGroup(engine, learner).follow(_mapping(plan, engine, learner))
    return 0


def _mapping(plan: Plan, engine: Engine, learner: Learner) -> Callable[[Sequence[Group]], TrainingBatch]:
    return partial(
        to_batch,
        vocab_size=engine.vocab_size,
        max_tokens=plan.max_token_len,
        temperature=plan.temperature,
        compares=learner.compares,
        distills=learner.distills,
    )


def _tracker(plan: Plan, config: DictConfig) -> Tracker:
    return open_tracker(config, run=plan.run, policy=plan.policy, folder=plan.tracking_dir)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: can't be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(f"{folder}: not writable")

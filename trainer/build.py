"""Wires the parts of one trainer process and runs them: the policy's only trainer, or one of several replicas; rank 0, or another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from lachesis.trainer.loop import Trainer, training_loop
from lachesis.trainer.metrics.tracker import Tracker, open_tracker
from lachesis.trainer.settings import TrainerSettings
from lachesis.trainer.writer_lock import WriteAccess, WriterLease

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Learner

PATIENCE = 3  # times the silence after which a replica is taken out: then all are taken to be gone


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
        with build_trainer(config, plan, broker, stop, log) as trainer:
            if trainer is None:
                return 0
            training_loop(trainer)
        log.info("stopped" if trainer.weights_step < plan.num_steps else "finished", step=trainer.weights_step)
    return 0


@contextmanager
def build_trainer(
    config: DictConfig, plan: Plan, broker: BlockingBroker, stop: threading.Event, log: BoundLogger
) -> Iterator[Trainer[Any] | None]:
    """For rank 0: the trainer, ready for training_loop; None if it was stopped while another one holds the policy."""
    with ExitStack() as parts:
        build = _build_elastic if plan.elastic else _build_solo
        yield build(config, plan, broker, stop, log, parts)


def _build_solo(
    config: DictConfig,
    plan: Plan,
    broker: BlockingBroker,
    stop: threading.Event,
    log: BoundLogger,
    parts: ExitStack,
) -> Trainer[Any] | None:
    writer_lease = parts.enter_context(WriterLease(broker, plan.policy, ttl_s=plan.lease_s))
    engine = build_engine(config)
    # these need verl, which build_engine has imported for the right platform
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.lifecycle import RunLifecycle
    from lachesis.trainer.metrics.reporter import Reporter
    from lachesis.trainer.prefetch import Prefetcher
    from lachesis.trainer.solo import SoloTrainer
    from lachesis.trainer.weights.checkpoint import make_checkpoints
    from lachesis.trainer.weights.publisher import make_publisher

    learner = Learner(engine, config.algorithm)
    rank_group = parts.enter_context(RankGroup(engine, learner))
    if not writer_lease.wait(
        unless=stop.is_set, on_standby=lambda: log.info("standby: another trainer holds this policy")
    ):
        return None
    publisher = parts.enter_context(make_publisher(broker, plan, writer_lease, log))
    checkpoints = make_checkpoints(plan, rank_group, broker)
    prefetcher = parts.enter_context(Prefetcher(broker, plan, writer_lease, _mapping(plan, engine, learner)))
    tracker = parts.enter_context(_tracker(plan, config))
    trainer = SoloTrainer(
        broker=broker,
        plan=plan,
        rank_group=rank_group,
        lifecycle=RunLifecycle(broker, plan, rank_group, checkpoints, publisher, writer_lease, log),
        prefetcher=prefetcher,
        writer_lease=writer_lease,
        reporter=Reporter(broker, plan, engine, tracker, log),
        stopping=stop.is_set,
        log=log,
    )
    trainer.resume()
    log.info("training", step=trainer.weights_step, num_steps=plan.num_steps, ranks=world_size())
    return trainer


def _build_elastic(
    config: DictConfig,
    plan: Plan,
    broker: BlockingBroker,
    stop: threading.Event,
    log: BoundLogger,
    parts: ExitStack,
) -> Trainer[Any]:
    """One of several replicas of the policy, `lachesis.elastic`."""
    config, divide_by = summed_loss(config)
    engine = build_engine(config)
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.elastic.config import ElasticConfig
    from lachesis.trainer.elastic.group_accumulator import GroupAccumulator
    from lachesis.trainer.elastic.leader import Leader
    from lachesis.trainer.elastic.replica import ElasticReplica
    from lachesis.trainer.elastic.sharded_accumulator import ShardedAccumulator
    from lachesis.trainer.lifecycle import RunLifecycle
    from lachesis.trainer.metrics.reporter import Reporter
    from lachesis.trainer.weights.checkpoint import make_checkpoints
    from lachesis.trainer.weights.publisher import make_publisher

    reporter = Reporter(broker, plan, engine, parts.enter_context(_tracker(plan, config)), log)
    learner = Learner(engine, config.algorithm)
    mapping = _mapping(plan, engine, learner)
    mine = GroupAccumulator(engine, learner, mapping, divide_by=divide_by, exact=plan.exact)
    several = engine.ranks.size > 1
    accumulator = ShardedAccumulator(mine, engine.ranks, broker.broker.url, plan.run) if several else mine
    rank_group = parts.enter_context(RankGroup(engine, learner))

    def make_lifecycle(right: WriteAccess, of_leader: ExitStack) -> RunLifecycle:
        publisher = of_leader.enter_context(make_publisher(broker, plan, right, log))
        checkpoints = make_checkpoints(plan, rank_group, broker)
        return RunLifecycle(broker, plan, rank_group, checkpoints, publisher, right, log)

    def make_leader(membership: WriteAccess) -> Leader:
        return Leader(broker, plan, accumulator, mapping, membership, reporter, log, make_lifecycle)

    agreed = ElasticConfig(
        policy=plan.policy,
        batch_size=plan.batch_size,
        num_steps=plan.num_steps,
        silent_s=plan.lease_s,
        hold_s=PATIENCE * plan.lease_s,
        max_deliveries=plan.max_deliveries,
        shadow=plan.shadow is not None,
        backend=plan.elastic_over,
        prefetch=plan.prefetch > 0,
    )
    return parts.enter_context(ElasticReplica(broker, agreed, plan.replica, accumulator, make_leader, stop.is_set))


def _follow(config: DictConfig, plan: Plan, settings: TrainerSettings) -> int:
    """A rank that is not rank 0: it needs no signals, and ends when that one says so."""
    config, divide_by = summed_loss(config) if plan.elastic else (config, "")
    engine = build_engine(config)
    if settings.dry_run:
        return 0
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.elastic.group_accumulator import GroupAccumulator
    from lachesis.trainer.elastic.sharded_accumulator import ShardFollower

    learner = Learner(engine, config.algorithm)
    mapping, rank_group = _mapping(plan, engine, learner), RankGroup(engine, learner)
    if not plan.elastic:
        rank_group.follow(mapping)
        return 0
    mine = GroupAccumulator(engine, learner, mapping, divide_by=divide_by, exact=plan.exact)
    with closing(ShardFollower(mine, engine.ranks, plan.elastic_over)) as follower:
        rank_group.follow(mapping, follower.follow)
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

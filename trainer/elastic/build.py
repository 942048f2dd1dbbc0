"""Wires one of several replicas of a policy, `lachesis.elastic`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from omegaconf import DictConfig
from structlog.stdlib import BoundLogger

from lachesis.broker import BlockingBroker
from lachesis.broker.records.groups import Group
from lachesis.trainer.algo.learner import Learner
from lachesis.trainer.algo.rank_group import RankGroup
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.elastic.config import ElasticConfig
from lachesis.trainer.elastic.group_accumulator import GroupAccumulator
from lachesis.trainer.elastic.leader import Leader
from lachesis.trainer.elastic.replica import ElasticReplica
from lachesis.trainer.elastic.sharded_accumulator import ShardedAccumulator, ShardFollower
from lachesis.trainer.engine.verl_engine import Engine
from lachesis.trainer.lifecycle import RunLifecycle
from lachesis.trainer.metrics.reporter import Reporter
from lachesis.trainer.weights.checkpoint import make_checkpoints
from lachesis.trainer.weights.publisher import make_publisher
from lachesis.trainer.writer_lock import WriteAccess

PATIENCE = 3  # times the silence after which a replica is taken out: then all are taken to be gone


def train_together(
    *,
    broker: BlockingBroker,
    plan: Plan,
    engine: Engine,
    algorithm: DictConfig,
    divide_by: str,
    mapping: Callable[[Engine, Learner], Callable[[Sequence[Group]], TrainingBatch]],
    reporter: Reporter,
    stop: threading.Event,
    log: BoundLogger,
) -> int:
    """Train until the last step, or until `stop` is set. Returns the step of the weights in memory."""
    learner = Learner(engine, algorithm)
    rank_group, mapped = RankGroup(engine, learner), mapping(engine, learner)
    mine = GroupAccumulator(engine, learner, mapped, divide_by=divide_by, exact=plan.exact)
    several = engine.ranks.size > 1
    accumulator = ShardedAccumulator(mine, engine.ranks, broker.broker.url, plan.run) if several else mine

    def make_lifecycle(right: WriteAccess, parts: ExitStack) -> RunLifecycle:
        publisher = make_publisher(broker, plan, right, log)
        checkpoints = make_checkpoints(plan, rank_group, broker)
        return RunLifecycle(broker, plan, rank_group, checkpoints, parts.enter_context(publisher), right, log)

    config = ElasticConfig(
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

    def make_leader(membership: WriteAccess) -> Leader:
        return Leader(broker, plan, accumulator, mapped, membership, reporter, log, make_lifecycle)

    with rank_group, ElasticReplica(broker, config, plan.replica, accumulator, make_leader, stop.is_set) as replica:
        replica.train()
    return replica.step


def follow_together(
    *,
    plan: Plan,
    engine: Engine,
    algorithm: DictConfig,
    divide_by: str,
    mapping: Callable[[Engine, Learner], Callable[[Sequence[Group]], TrainingBatch]],
) -> None:
    """A rank of such a replica that is not its first: it does as that one does."""
    learner = Learner(engine, algorithm)
    mapped = mapping(engine, learner)
    mine = GroupAccumulator(engine, learner, mapped, divide_by=divide_by, exact=plan.exact)
    with closing(ShardFollower(mine, engine.ranks, plan.elastic_over)) as follower:
        RankGroup(engine, learner).follow(mapped, follower.follow)

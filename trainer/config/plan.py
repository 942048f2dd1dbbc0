"""The configuration of one run, resolved and checked before anything expensive starts."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.keys import check_name
from lachesis.broker.records.registrations import KeptConfiguration
from lachesis.broker.retention.shadows import Rule
from lachesis.service.settings import RedisSettings
from lachesis.trainer.config.algorithms import check_algorithm, check_elastic, settle_algorithm
from lachesis.trainer.config.model import find_model, max_positions
from lachesis.trainer.config.rules import NUMBER, Backend, check_rules
from lachesis.trainer.config.tracking_backends import check_backends


@dataclass(frozen=True)
class Plan:
    """The node `lachesis` of the configuration, resolved for one run."""

    run: str
    policy: str
    shadow: Rule | None  # how it reads along with the policy that environments know; None: it is that one
    replica: str
    model_dir: Path
    batch_size: int
    max_token_len: int
    num_steps: int
    prefetch: int  # batches made ready while one trains: 0 or 1
    lockstep: bool  # whether environments wait for the version trained from a batch before they make the next
    publish_every: int
    checkpoint_every: int
    keep_versions: int
    weights_dir: Path  # of this run and policy
    weights_url: str  # where agents fetch the versions, of this run and policy; empty: from weights_dir
    full_every: int  # there: versions from one that lies whole to the next; those between as differences
    weights_dtype: str
    checkpoint_dir: Path  # of this run and policy
    lease_s: float
    elastic: bool  # whether replicas train each step together
    elastic_over: Backend  # what their sums go over
    exact: bool  # whether their sums are the same bit for bit, however many they are
    max_deliveries: int
    temperature: float
    examples_every: int  # steps; 0: no examples
    tracking: tuple[str, ...]  # verl's backends
    tracking_dir: Path  # of this run and policy
    wandb_project: str
    wandb_group: str
    unverified_checkpoints: bool = False  # whether one that Redis does not know is loaded, too
    kept: KeptConfiguration | None = None  # told to the run when this trainer begins


def check_config(config: DictConfig) -> None:
    """Raise ConfigurationError for what can't work, whatever the model."""
    ours = config.lachesis
    check_rules(config)
    check_name("lachesis.policy", ours.policy)
    if ours.replica is not None:
        check_name("lachesis.replica", ours.replica)
    if ours.shadow != "off" and ours.policy == "main":
        raise ConfigurationError(
            f"lachesis.shadow = {ours.shadow!r}: give the shadow a name of its own with lachesis.policy=NAME; 'main' is what it "
            "trains along with"
        )
    if ours.full_every > 1 and not is_url(ours.weights_dir):
        raise ConfigurationError(
            f"lachesis.full_every = {ours.full_every!r}: versions in a folder are always whole; it needs a URL as "
            "lachesis.weights_dir"
        )
    if is_url(ours.checkpoint_dir):
        raise ConfigurationError(
            f"lachesis.checkpoint_dir = {ours.checkpoint_dir!r}: must be a folder; only lachesis.weights_dir may be a URL"
        )
    temperature = config.actor_rollout_ref.rollout.temperature
    if isinstance(temperature, bool) or not isinstance(temperature, NUMBER) or not temperature > 0:
        raise ConfigurationError(f"actor_rollout_ref.rollout.temperature = {temperature!r}: must be above 0")
    check_algorithm(config)
    _check_device(config)
    if ours.elastic_over == "nccl" and ours.device != "cuda":
        raise ConfigurationError("lachesis.elastic_over = 'nccl': needs a GPU (device=cuda); without one it is gloo")
    if ours.elastic:
        check_elastic(config)
    check_backends(ours.tracking)


def longest_sequence(config: DictConfig, positions: int) -> int:
    """The most tokens of a sequence that is taken, by a model of so many positions. Raises ConfigurationError."""
    ours, longest = config.lachesis, min(positions, config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu)
    given = ours.max_token_len
    if given is None:
        return int(longest)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 < given <= longest:
        raise ConfigurationError(
            f"lachesis.max_token_len = {given!r}: must be from 1 to {longest}, what the model and one "
            "micro-batch (actor_rollout_ref.actor.ppo_max_token_len_per_gpu) can hold"
        )
    return given


def make_plan(config: DictConfig, settings: RedisSettings) -> Plan:
    """Check everything that can be checked without building the engine. The model's path in `config` becomes local."""
    ours = config.lachesis
    check_config(config)
    if not config.actor_rollout_ref.model.path:
        raise ConfigurationError(
            "which model? Give actor_rollout_ref.model.path=FOLDER, or a Hugging Face model's name"
        )
    model_dir = find_model(config.actor_rollout_ref.model.path)
    config.actor_rollout_ref.model.path = str(model_dir)
    longest = longest_sequence(config, max_positions(model_dir))
    settle_algorithm(config, longest)
    policy = ours.policy
    place = Path(settings.run, policy)
    weights_dir = str(ours.weights_dir or settings.state_dir / "weights").removeprefix("file://")
    weights_url = weights_dir.rstrip("/") if is_url(weights_dir) else ""
    return Plan(
        run=settings.run,
        policy=policy,
        shadow=None if ours.shadow == "off" else Rule(ours.shadow, ours.max_behind),
        replica=ours.replica or check_name("lachesis.replica", socket.gethostname()),
        model_dir=model_dir,
        batch_size=ours.batch_size,
        max_token_len=longest,
        num_steps=ours.num_steps,
        prefetch=ours.prefetch,
        lockstep=ours.lockstep,
        publish_every=ours.publish_every,
        checkpoint_every=ours.checkpoint_every,
        keep_versions=ours.keep_versions,
        weights_dir=Path(settings.state_dir / "weights" if weights_url else weights_dir).absolute() / place,
        weights_url=weights_url and f"{weights_url}/{settings.run}/{policy}",
        full_every=ours.full_every,
        weights_dtype=ours.weights_dtype,
        checkpoint_dir=Path(ours.checkpoint_dir or settings.state_dir / "checkpoints").absolute() / place,
        lease_s=float(ours.lease_s),
        elastic=ours.elastic,
        elastic_over=ours.elastic_over,
        exact=ours.elastic_dtype == "fp64",
        max_deliveries=ours.max_deliveries,
        temperature=float(config.actor_rollout_ref.rollout.temperature),
        examples_every=ours.examples_every,
        tracking=check_backends(ours.tracking),
        tracking_dir=settings.state_dir.absolute() / "tracking" / place,
        wandb_project=ours.wandb_project,
        wandb_group=ours.wandb_group or settings.run,
        unverified_checkpoints=ours.unverified_checkpoints,
    )


def is_url(place: object) -> bool:
    """Whether it names a place that is not a folder of this machine."""
    return "://" in str(place) and not str(place).startswith("file://")


def _check_device(config: DictConfig) -> None:
    actor = config.actor_rollout_ref.actor
    on_cpu = config.lachesis.device == "cpu"
    if on_cpu and actor.strategy != "fsdp2":
        raise ConfigurationError(
            f"actor_rollout_ref.actor.strategy = {actor.strategy!r}: without an accelerator only fsdp2 works"
        )
    attention = config.actor_rollout_ref.model.override_config.attn_implementation
    if on_cpu and attention.startswith("flash"):
        raise ConfigurationError(
            f"actor_rollout_ref.model.override_config.attn_implementation = {attention!r}: needs an accelerator; use sdpa"
        )

"""What `lachesis trainer` is told outside of Hydra: which Redis and run. The training itself is configured in config/."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import CliPositionalArg

from lachesis.broker.settings import RedisSettings


class TrainerSettings(RedisSettings):
    """Train a policy with verl on batches from Redis, and publish its weights.

    What and how to train are Hydra overrides over trainer/config/trainer.yaml, which extends verl's own
    configuration: `lachesis trainer --redis-url … actor_rollout_ref.model.path=FOLDER lachesis.num_steps=200`.
    """

    print_config: bool = Field(False, description="print the resolved Hydra configuration and exit")
    dry_run: bool = Field(False, description="check everything, build the engine, and exit without training")
    ray_ranks: int = Field(
        0, ge=0, description="train with so many ranks as actors of a Ray cluster (RAY_ADDRESS); 0: in this process"
    )
    ray_ranks_per_node: int = Field(0, ge=0, description="ranks on one node of that cluster; 0: all on one")
    overrides: CliPositionalArg[list[str]] = Field(
        default_factory=list, description="Hydra overrides, e.g. actor_rollout_ref.actor.optim.lr=1e-5"
    )

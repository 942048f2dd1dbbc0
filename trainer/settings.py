"""What `lachesis trainer` is told outside of Hydra: which Redis and run. The training itself is configured in config/."""

from __future__ import annotations

import textwrap
from importlib.resources import files
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from lachesis.service.settings import RedisSettings


class TrainerSettings(RedisSettings):
    """Train a policy with verl on batches from Redis, and publish its weights.

    What and how to train are Hydra overrides over trainer/config/trainer.yaml, which extends verl's own
    configuration: `lachesis trainer --redis-url … actor_rollout_ref.model.path=FOLDER lachesis.num_steps=200`.
    """

    like_run: bool = Field(
        False,
        description="train with what the run's trainer was told, for one more replica; overrides and options given here win",
    )
    cfg: Literal["job"] | None = Field(None, description="job: print the resolved configuration, and exit")
    dry_run: bool = Field(
        False,
        description="check everything, build the engine, write the resolved configuration to the state folder, and exit",
    )
    ray_ranks: int = Field(
        0, ge=0, description="train with so many ranks as actors of a Ray cluster (RAY_ADDRESS); 0: in this process"
    )
    ray_ranks_per_node: int = Field(0, ge=0, description="ranks on one node of that cluster; 0: all on one")
    overrides: CliPositionalArg[list[str]] = Field(
        default_factory=list, description="Hydra overrides, e.g. actor_rollout_ref.actor.optim.lr=1e-5"
    )


def quoted(text: str) -> str:
    """A text as Hydra reads it in an override, whatever is in it."""
    return "'" + text.replace("'", "\\'") + "'"


def explain_overrides() -> str:
    """What --help says beyond the options: every override of ours, and how to write one. Imports nothing heavy."""
    config = files("lachesis.trainer.config")
    ours = (config / "trainer.yaml").read_text().partition("\nlachesis:")[2]
    presets = {
        folder.name: sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        for folder in config.iterdir()
        if folder.is_dir() and folder.name != "__pycache__"
    }
    return "\n".join(
        (
            "overrides, in Hydra's syntax:",
            "  lachesis.batch_size=64                           a value",
            "  'lachesis.tracking=[tensorboard,file]'           a list (quote it for the shell)",
            "  actor_rollout_ref.actor.clip_ratio_high=0.28     what verl calls its own keeps its name; see",
            "                                                   --cfg job for all of verl's that are read",
            *(line for name, names in sorted(presets.items()) for line in _choices(name, names)),
            "",
            "ours, and verl's that have another default here:",
            "  lachesis:" + ours.rstrip().replace("\n", "\n  "),
        )
    )


def _choices(name: str, presets: list[str]) -> list[str]:
    rows = textwrap.wrap(", ".join(presets), 70)
    return [f"  {name + '=NAME':<48} a preset, one of", *(f"      {row}" for row in rows)]

"""Settings of `lachesis up`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import CliPositionalArg

from lachesis.service.settings import RedisSettings

TINY = "tiny"


class UpSettings(RedisSettings):
    """Train on this machine: starts Redis, the shim, SGLang, the trainer and an environment, and keeps them running.

    Ctrl-C drains; running the same command again resumes. Anything after the options is passed to the trainer as a
    Hydra override, e.g. actor_rollout_ref.actor.optim.lr=1e-6.
    """

    model: str = Field(TINY, description="model folder or Hugging Face name; 'tiny' makes one here, for arithmetic")
    env: str = Field(
        "", description="environment: arithmetic or gsm8k (default: arithmetic for the tiny model, else gsm8k)"
    )
    steps: int = Field(0, ge=0, description="optimizer steps in all (0: what the environment's recipe says)")
    gpus: int = Field(-1, ge=-1, description="GPUs to use; 0 trains on the CPU (-1: all there are)")
    servers: int = Field(1, ge=1, description="SGLang servers")
    seed: int = Field(0, ge=0, description="seed of the tiny model, the problems and the trainer")
    data: str = Field("", description="file of problems for environments that take one")
    shim_port: int = Field(8000, ge=0, le=65535, description="port of the shim (0: any free one)")
    front_door_port: int = Field(9000, ge=0, le=65535, description="port of the front door (0: any free one)")
    sglang_python: str = Field("", description="interpreter of the environment SGLang is installed in (default: found)")
    fresh: bool = Field(False, description="forget what this run did before and start over")
    overrides: CliPositionalArg[list[str]] = Field(default_factory=list, description="Hydra overrides for the trainer")

"""Records of who takes part in a run: trainers, environments, the archiver, tokens."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class TrainerConfig(Struct, frozen=True):
    """What a trainer registers: Atropos' `/register` body. `batch_size` counts sequences."""

    wandb_group: str
    wandb_project: str
    batch_size: int
    max_token_len: int
    checkpoint_dir: str
    save_checkpoint_interval: int
    starting_step: int
    num_steps: int


class KeptConfiguration(Struct, frozen=True):
    """What a policy is trained with (hash `settings`, field `trainer:<policy>`), for one more trainer like it."""

    overrides: tuple[str, ...] = ()  # as they were given; folders by their whole path, without the replica's name
    state_dir: str = ""
    resolved: str = ""  # YAML: what those made of every setting that is read


class EnvConfig(Struct, frozen=True):
    """What an environment registers: Atropos' `/register-env` body."""

    max_token_length: int
    desired_name: str
    weight: float
    group_size: int
    min_batch_allocation: float | None = None


class EnvRecord(Struct, frozen=True):
    env_id: int
    name: str  # "<desired_name>_<k>"
    config: EnvConfig
    connected: bool = True
    registered_at: float = 0.0
    heard_at: float = 0.0  # when it last called, to within a few seconds
    owner: str = ""  # name of the token that it registered with; empty: any may act for it


class ArchiverStatus(Struct, frozen=True):
    """Heartbeat of the process that archives a run (field `archiver` of the hash `state`)."""

    who: str  # host:pid
    url: str
    policy: str  # whose trained batches are archived
    bytes: int  # written since it started
    heartbeat: float


Role = Literal["environment", "trainer", "admin"]


class TokenRecord(Struct, frozen=True):
    """What is kept of one bearer token (hash `tokens`, by name): never the token itself."""

    name: str
    role: Role
    sha256: str  # of the token, in hex
    created_at: float
    revoked_at: float | None = None

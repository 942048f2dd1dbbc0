"""Settings of `lachesis env`."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from pydantic import Field
from pydantic_settings import CliPositionalArg

from lachesis.service.settings import Settings


class EnvSettings(Settings):
    """Make rollouts of one environment and post them to the shim. It speaks HTTP only and needs no Redis."""

    name: CliPositionalArg[str] = Field(description="environment: arithmetic or gsm8k")
    shim_url: str = Field(
        "http://127.0.0.1:8000",
        description="address of the shim, with /runs/RUN for a run that is not its own, and x:TOKEN@ before the host "
        "where that run has tokens; or of any Atropos API server",
    )
    front_door_url: str = Field(
        "http://127.0.0.1:9000",
        description="address of the front door, without /v1; with x:TOKEN@ before the host where the run has tokens",
    )
    model: str = Field("", description="folder or name of the model, for its tokenizer")
    seed: int = Field(0, ge=0, description="decides the order of the training problems")
    data: str = Field("", description="file of problems, for environments that take one")
    max_new_tokens: int = Field(0, ge=0, description="longest answer, in tokens (0: the task's)")
    group_size: int = Field(0, ge=0, description="answers per problem (0: the recipe's)")
    max_batches_offpolicy: int = Field(0, ge=0, description="batches that may wait for the trainer (0: the recipe's)")
    max_workers: int = Field(0, ge=0, description="groups generated at the same time (0: the recipe's)")
    steps_per_eval: int = Field(0, ge=0, description="steps between held-out evaluations (0: none)")


def split_token(url: str) -> tuple[str, str]:
    """The address without the token, and the token; empty if there is none."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host).geturl(), unquote(parts.password or "")

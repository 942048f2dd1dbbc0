"""`lachesis base-model`: the tiny model and tokenizer that the built-in environment starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from lachesis.cli.options import parse
from lachesis.cli.terminal import say
from lachesis.service.settings import Settings


class BaseModelSettings(Settings):
    """Make the tiny base model for the arithmetic environment: no download, same seed, same weights."""

    out: Path = Field(Path(".lachesis/models/tiny-0"), description="folder to make; one that exists is left as it is")
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of its weights and its warm-up")


def main(arguments: Sequence[str]) -> int:
    settings = parse(BaseModelSettings, "base-model", arguments)
    from lachesis.envs.arithmetic.base_model import ensure_base_model

    folder = ensure_base_model(settings.out, settings.seed, lambda text: say(text, flush=True))
    say(f"base model: {folder}")
    return 0

"""`lachesis tail`: the newest steps, evaluations and weight updates of a run, rollouts in words, or who came and went."""

from __future__ import annotations

from collections.abc import Sequence

from lachesis.broker.errors import ConfigurationError
from lachesis.cli.commands.tail_settings import TailSettings
from lachesis.cli.options import parse


def main(arguments: Sequence[str]) -> int:
    settings = parse(TailSettings, "tail", arguments)
    if settings.examples and settings.control:
        raise ConfigurationError("--examples and --control exclude each other: give one of them")
    from lachesis.cli.commands.entries import show  # for which --help need not wait

    return show(settings)

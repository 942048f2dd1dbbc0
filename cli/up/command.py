"""`lachesis up`: the whole loop on this machine, every part a process of its own."""

from __future__ import annotations

from collections.abc import Sequence

from lachesis.cli.options import parse
from lachesis.cli.up.settings import UpSettings


def main(arguments: Sequence[str]) -> int:
    settings = parse(UpSettings, "up", arguments)
    from lachesis.cli.up.run import run  # for which --help need not wait

    return run(settings)

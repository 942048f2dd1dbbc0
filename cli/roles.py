"""The roles alone, one process each: what `lachesis up` supervises and what compose.yaml runs."""

from __future__ import annotations

from collections.abc import Sequence

from lachesis.cli.options import parse
from lachesis.cli.terminal import say


def shim(arguments: Sequence[str]) -> int:
    from lachesis.shim.settings import ShimSettings

    settings = parse(ShimSettings, "shim", arguments)
    from lachesis.shim.main import run

    return run(settings)


def trainer(arguments: Sequence[str]) -> int:
    from lachesis.trainer.settings import TrainerSettings, explain_overrides

    try:
        settings = parse(TrainerSettings, "trainer", arguments)
    except SystemExit:  # --help
        say("", *explain_overrides().split("\n"))
        raise
    from lachesis.trainer.main import run

    return run(settings)


def inference(arguments: Sequence[str]) -> int:
    from lachesis.inference.settings import AgentSettings

    settings = parse(AgentSettings, "inference", arguments)
    from lachesis.inference.agent.agent import run

    return run(settings)


def front_door(arguments: Sequence[str]) -> int:
    from lachesis.inference.settings import FrontDoorSettings

    settings = parse(FrontDoorSettings, "front-door", arguments)
    from lachesis.inference.gateway.app import run

    return run(settings)


def env(arguments: Sequence[str]) -> int:
    from lachesis.envs.settings import EnvSettings

    settings = parse(EnvSettings, "env", arguments)
    from lachesis.envs.main import run

    return run(settings)

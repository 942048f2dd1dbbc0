"""`lachesis evaluate`: held-out accuracy of whatever a front door serves now."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lachesis.cli.options import parse
from lachesis.cli.terminal import say, say_json
from lachesis.service.http.urls import check_url
from lachesis.service.settings import Settings


class EvaluateSettings(Settings):
    """Ask the front door the environment's held-out problems, greedily, and grade the answers."""

    env: str = Field("arithmetic", description="environment whose held-out problems to ask")
    front_door_url: str = Field("http://127.0.0.1:9000", description="address of the front door")
    model: str = Field("", description="name of the model to ask the front door for (default: policy)")
    data: str = Field("", description="file of problems for environments that take one")
    limit: int = Field(500, ge=1, description="at most so many problems")
    json_output: bool = Field(False, alias="json", description="print one JSON object")


def main(arguments: Sequence[str]) -> int:
    settings = parse(EvaluateSettings, "evaluate", arguments)
    check_url("--front-door-url", settings.front_door_url)
    from lachesis.envs.evaluate import evaluate

    result = evaluate(
        settings.front_door_url, settings.env, settings.model, data=settings.data or None, limit=settings.limit
    )
    if settings.json_output:
        say_json(result)
        return 0
    say(f"held-out accuracy {result.accuracy:.3f} over {result.n} problems in {result.seconds:.1f} s")
    for kind, accuracy in sorted(result.per_kind.items()):
        say(f"  {kind}: {accuracy:.3f}")
    return 0

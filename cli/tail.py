"""`lachesis tail`: the newest steps, evaluations and weight updates of a run, or rollouts in words; and what comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec
from pydantic import Field
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from lachesis.broker.client import Broker
from lachesis.broker.settings import RedisSettings
from lachesis.cli.options import parse

BLOCK_S = 2.0  # one wait for something new


class TailSettings(RedisSettings):
    """Show what a run's parts have told: its newest steps, evaluations and weight updates, a line each.

    With --examples: rollouts of its steps in words, best and worst, and the evaluations between them.
    """

    examples: bool = Field(False, description="show rollouts: prompt, response, score, advantage and versions")
    lines: int = Field(10, ge=0, le=10_000, description="how many of the newest to show")
    follow: bool = Field(False, description="go on showing what comes, until Ctrl-C")
    json_output: bool = Field(False, alias="json", description="print one JSON object a line, every field of it")


def main(arguments: Sequence[str]) -> int:
    settings = parse(TailSettings, "tail", arguments)
    with settings.redis() as url:
        return asyncio.run(_tail(url, settings))


async def _tail(url: str, settings: TailSettings) -> int:
    shown = EXAMPLES if settings.examples else LINES
    console = Console(highlight=False, markup=False, soft_wrap=not settings.examples)
    broker = await Broker.connect(url, settings.run)

    def show(fields: Mapping[str, str]) -> None:
        if settings.json_output:
            print(msgspec.json.encode(fields).decode(), flush=True)
        else:
            console.print(shown[fields["kind"]](fields))

    try:
        cursor, newest = await broker.journal.newest(settings.lines, set(shown))
        for fields in newest:
            show(fields)
        if not newest and not settings.follow:
            print(f"run {settings.run!r} has told nothing{' of that kind' if settings.examples else ''} yet")
        while settings.follow:
            for id_, fields in await broker.journal.metrics(cursor, block_s=BLOCK_S):
                cursor = id_
                if fields["kind"] in shown:
                    show(fields)
        return 0
    finally:
        await broker.aclose()


def _step(fields: Mapping[str, str]) -> str:
    numbers = "  ".join(
        f"{label} {float(fields[name]):{form}}"
        for name, label, form in (
            ("reward", "reward", ".3f"),
            ("loss", "loss", ".4f"),
            ("grad_norm", "grad norm", ".3g"),
            ("entropy", "entropy", ".3f"),
            ("lag", "lag", ".0f"),
            ("tokens_per_s", "tokens/s", ",.0f"),
            ("step_s", "s", ".2f"),
            ("wait_share", "wait", ".0%"),
        )
        if name in fields
    )
    return f"step {fields['step']}/{fields['num_steps']}  {numbers}"


def _eval(fields: Mapping[str, str]) -> str:
    return f"held-out accuracy {float(fields['accuracy']):.3f} with version {fields['version']}, {fields['n']} problems"


def _update(fields: Mapping[str, str]) -> str:
    return "weights " + "  ".join(f"{name} {value}" for name, value in fields.items() if name != "kind")


def _example(fields: Mapping[str, str]) -> RenderableType:
    versions = fields["v_min"] if fields["v_min"] == fields["v_max"] else f"{fields['v_min']} to {fields['v_max']}"
    title = f"step {fields['step']} · score {fields['score']} · advantage {fields['advantage']} · version {versions}"
    place = f"group {fields['gid'][:16]}, sequence {fields['row']} · environment {fields['env']} · {fields['tokens']} tokens"
    body = Group(Text(fields["prompt"], style="dim"), Text(fields["response"], style="bold"))
    return Panel(body, title=Text(title), subtitle=Text(place), title_align="left", subtitle_align="left")


LINES: dict[str, Callable[[Mapping[str, str]], RenderableType]] = {
    "step": _step,
    "shadow": lambda fields: f"{fields['policy']}: {_step(fields)}",
    "eval": _eval,
    "update": _update,
}
EXAMPLES: dict[str, Callable[[Mapping[str, str]], RenderableType]] = {"example": _example, "eval": _eval}

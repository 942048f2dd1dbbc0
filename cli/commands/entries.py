"""The entries of a run's logs as a person reads them, a line or a panel each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from lachesis.broker.client import Broker
from lachesis.broker.run.journal import Entry, written_at
from lachesis.cli.actions import with_broker
from lachesis.cli.commands.tail_settings import TailSettings
from lachesis.cli.terminal import console, say, say_json, visible

ENTRY_WAIT_S = 2.0  # one wait for something new
ENV_SCORE = "env_score/"  # and the environment's name: the mean score of its sequences in a step
TEXTS = {"kind", "policy", "server", "gid", "env", "env_name", "prompt", "response"}  # fields that are no numbers


def show(settings: TailSettings) -> int:
    """Print the newest entries, and with `follow` those that come."""
    return with_broker(settings, lambda broker: _show(broker, settings))


async def _show(broker: Broker, settings: TailSettings) -> int:
    shown = EXAMPLES if settings.examples else LINES
    screen = console(soft_wrap=not settings.examples)
    journal = broker.journal

    def show_one(entry: Entry) -> None:
        if settings.json_output:
            say_json(as_json(entry, texts_only=settings.control))
        elif settings.control:
            screen.print(_event(entry))
        else:
            screen.print(_line(entry, shown))

    if settings.control:
        cursor, newest = await journal.newest_events(settings.lines)
    else:
        cursor, newest = await journal.newest(settings.lines, set(shown))
    for entry in newest:
        show_one(entry)
    if not newest and not settings.follow and settings.lines:
        say(
            f"run {settings.run!r} has told nothing{' of that kind' if settings.examples or settings.control else ''} yet"
        )
    while settings.follow:
        read = journal.events if settings.control else journal.metrics
        for entry in await read(cursor, block_s=ENTRY_WAIT_S):
            cursor = entry[0]
            if settings.control or entry[1].get("kind") in shown:
                show_one(entry)
    return 0


def _line(entry: Entry, shown: Mapping[str, Callable[[Entry], RenderableType]]) -> RenderableType:
    try:
        return shown[entry[1]["kind"]](entry)
    except (KeyError, ValueError):  # another release's, which told other fields
        return f"{_clock(entry)}  " + "  ".join(f"{name} {value}" for name, value in entry[1].items())


def as_json(entry: Entry, *, texts_only: bool = False) -> dict[str, Any]:
    """Its fields, numbers as numbers, and `at`; what is no number, as the loss of a step without one, is null."""
    id_, fields = entry
    values = {name: text if texts_only or name in TEXTS else _number(text) for name, text in fields.items()}
    return {"at": written_at(id_), **values}


def _number(text: str) -> float | int | str | None:
    try:
        value = float(text)
    except ValueError:
        return None if text == "-" else text
    if not math.isfinite(value):
        return None
    return int(text) if text.lstrip("-").isdigit() else value


def _clock(entry: Entry) -> str:
    return time.strftime("%H:%M:%S", time.localtime(written_at(entry[0])))


def _event(entry: Entry) -> str:
    fields = entry[1]
    day = time.strftime("%Y-%m-%d", time.localtime(written_at(entry[0])))
    who, what = fields.get("who", "-"), fields.get("event", "-")
    return f"{day} {_clock(entry)}  {what:<15}  {who}  {_words(fields.get('detail', ''))}".rstrip()


def _words(detail: str) -> str:
    """A registration, which is JSON, as `name value`."""
    try:
        values = msgspec.json.decode(detail, type=dict[str, Any])
    except msgspec.DecodeError:
        return detail
    nested = values.pop("config") if isinstance(values.get("config"), dict) else {}  # what an environment asked for
    return "  ".join(f"{name} {value}" for name, value in {**values, **nested}.items() if value not in (None, ""))


def _step(entry: Entry) -> str:
    fields = entry[1]
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
    scores = env_scores(fields)
    each = "  " + "  ".join(f"{name} {score:.3f}" for name, score in scores.items()) if len(scores) > 1 else ""
    return f"{_clock(entry)}  step {fields['step']}/{fields.get('num_steps', '?')}  {numbers}{each}"


def env_scores(fields: Mapping[str, str]) -> dict[str, float]:
    """The mean score of each environment in an entry of a step."""
    return {name.removeprefix(ENV_SCORE): float(value) for name, value in fields.items() if name.startswith(ENV_SCORE)}


def _eval(entry: Entry) -> str:
    fields = entry[1]
    kinds = {name.removeprefix("accuracy/"): float(value) for name, value in fields.items() if "accuracy/" in name}
    each = "".join(f"  {name} {accuracy:.3f}" for name, accuracy in kinds.items()) if len(kinds) > 1 else ""
    return (
        f"{_clock(entry)}  held-out accuracy {float(fields['accuracy']):.3f} with version {fields['version']}, "
        f"{fields['n']} problems{each}"
    )


def _update(entry: Entry) -> str:
    values = "  ".join(f"{name} {_short(value)}" for name, value in entry[1].items() if name != "kind")
    return f"{_clock(entry)}  weights  {values}"


def _short(text: str) -> str:
    value = text if "." not in text else _number(text)
    return f"{value:.3g}" if isinstance(value, float) else text


def _example(entry: Entry) -> RenderableType:
    fields = entry[1]
    versions = fields["v_min"] if fields["v_min"] == fields["v_max"] else f"{fields['v_min']} to {fields['v_max']}"
    title = f"{_clock(entry)} · step {fields['step']} · score {fields['score']} · advantage {fields['advantage']} · version {versions}"
    env = fields.get("env_name") or fields["env"]
    place = f"group {fields['gid'][:16]}, sequence {fields['row']} · environment {env} · {fields['tokens']} tokens"
    prompt, response = (visible(fields[name], keep="\n") for name in ("prompt", "response"))
    body = Group(Text(prompt, style="dim"), Text(response, style="bold"))
    return Panel(
        body, title=Text(visible(title)), subtitle=Text(visible(place)), title_align="left", subtitle_align="left"
    )


LINES: dict[str, Callable[[Entry], RenderableType]] = {
    "step": _step,
    "shadow": lambda entry: f"{entry[1]['policy']}: {_step(entry)}",
    "eval": _eval,
    "update": _update,
}
EXAMPLES: dict[str, Callable[[Entry], RenderableType]] = {"example": _example, "eval": _eval}

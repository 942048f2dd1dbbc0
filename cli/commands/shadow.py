"""`lachesis shadow`: policies that train on the same batches, side by side."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence

import msgspec
from pydantic import Field
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.retention.shadows import Reading
from lachesis.cli.actions import with_broker
from lachesis.cli.options import parse
from lachesis.cli.terminal import console, say, say_json
from lachesis.service.settings import RedisSettings

COMPARISON_POLL_S = 1.0
COMPARED = {
    "loss": ".4f",
    "grad_norm": ".3g",
    "entropy": ".3f",
    "logp_gap_mean": ".3f",  # from whom the rollouts are of
    "clip_frac": ".3f",
    "lr": ".2g",
    "step_s": ".2f",
}


class ShadowSettings(RedisSettings):
    """Compare the policies that train on a run's batches: the one that environments know, and its shadows.

    Of each: how far behind the formed batches it is, steps trained and skipped, and means over the newest steps that all of
    them have trained. A shadow is a trainer with lachesis.policy=NAME and lachesis.shadow=lossless or lossy.
    """

    steps: int = Field(20, ge=1, le=1000, description="compare over so many of the newest steps that all have trained")
    once: bool = Field(False, description="print it once instead of until Ctrl-C, as without a terminal")
    json_output: bool = Field(False, alias="json", description="print one JSON object, once")
    remove: str = Field(
        "", description="a shadow that is gone for good: nothing waits for it or is kept for it any more"
    )


class Comparison(msgspec.Struct, frozen=True):
    policies: list[Reading]
    steps: list[int]  # that all have trained and told of, oldest first
    means: dict[str, dict[str, float]]  # over those, by policy


def main(arguments: Sequence[str]) -> int:
    settings = parse(ShadowSettings, "shadow", arguments)
    return with_broker(settings, lambda broker: _run(broker, settings))


async def _run(broker: Broker, settings: ShadowSettings) -> int:
    if settings.remove:
        await _remove(broker, settings.remove)
        say(f"{settings.remove} is no reader of run {settings.run!r} any more; its ledger and versions stay")
    elif settings.json_output:
        say_json(await _compare(broker, settings.steps))
    elif settings.once or not sys.stdout.isatty():
        width = None if sys.stdout.isatty() else 200
        console(width=width).print(_shown(settings.run, await _compare(broker, settings.steps)))
    else:
        with Live(console=console(), auto_refresh=False) as live:
            while True:
                live.update(_shown(settings.run, await _compare(broker, settings.steps)), refresh=True)
                await asyncio.sleep(COMPARISON_POLL_S)
    return 0


async def _remove(broker: Broker, policy: str) -> None:
    shadows = await broker.queue.shadows.rules()
    if policy not in shadows:
        known = f"one of {', '.join(sorted(shadows))}" if shadows else "this run has none"
        raise ConfigurationError(f"remove = {policy!r}: not a shadow; {known}")
    if await broker.members.is_held(policy):
        raise ConfigurationError(f"remove = {policy!r}: its trainer is at work; end it first")
    await broker.queue.retention.leave(policy)
    await broker.queue.retention.free()
    await broker.journal.control("removed", policy, "a shadow")


async def _compare(broker: Broker, steps: int) -> Comparison:
    policies = await broker.queue.shadows.readings()
    behind = max((reading.behind for reading in policies), default=0)  # the others have told so much more
    wanted = 2 * (steps + behind) * max(1, len(policies))
    _, entries = await broker.journal.newest(wanted, {"step", "shadow"})
    told: dict[str, dict[int, Mapping[str, str]]] = {reading.policy: {} for reading in policies}
    for _, fields in entries:
        if (policy := fields.get("policy", "main")) in told:  # not one that was removed
            told[policy][int(fields["step"])] = fields
    common = sorted(set.intersection(*map(set, told.values())) if told else ())[-steps:]
    means = {
        policy: {
            name: sum(float(of[step][name]) for step in common) / len(common)
            for name in COMPARED
            if all(name in of[step] for step in common)
        }
        for policy, of in told.items()
        if common
    }
    return Comparison(policies, common, means)


def _shown(run: str, found: Comparison) -> Group | Text:
    if not found.policies:
        return Text(f"run {run!r}: no policy is trained yet")
    readers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("policy", "reads", "step", "trained", "skipped", "behind", ""):
        readers.add_column(name, justify="left" if name in ("policy", "reads", "") else "right")
    for reading in found.policies:
        rule = reading.rule
        readers.add_row(
            reading.policy,
            f"{rule.kind}, at most {rule.max_behind} behind" if rule else "asks for batches",
            *map(str, (reading.settled, reading.committed, reading.skipped, reading.behind)),
            "no batch is formed until it has trained one" if reading.holds else "",
        )
    if not found.steps:
        return Group(readers, Text("\nno step that all of them have trained and told of yet"))
    names = [name for name in COMPARED if all(name in means for means in found.means.values())]
    means = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    means.add_column("policy")
    for name in names:
        means.add_column(name, justify="right")
    for policy, values in found.means.items():
        means.add_row(policy, *(format(values[name], COMPARED[name]) for name in names))
    first, last = found.steps[0], found.steps[-1]
    title = f"\nmeans over {len(found.steps)} steps that all have trained, {first} to {last}"
    return Group(readers, Text(title), means)

"""`lachesis trainers`: which replicas train each policy, and what each of them is at."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import Field
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.records.steps import LedgerEntry, Member
from lachesis.broker.replicas.members import EpochState
from lachesis.cli.actions import check_policy, with_broker
from lachesis.cli.health import REPLICA_STALE_S
from lachesis.cli.options import parse
from lachesis.cli.terminal import console, say_json
from lachesis.service.settings import RedisSettings


class TrainersSettings(RedisSettings):
    """Show who trains each policy of a run: its replicas, the first of which also publishes and saves.

    Of each replica (those started with lachesis.elastic=true): the step of its weights, how many groups of the open
    step it has claimed and whether it has voted for their sum, groups of committed steps that were its own, per second
    since it joined, and how old its last heartbeat is.
    """

    policy: str | None = Field(None, description="show this policy only")
    json_output: bool = Field(False, alias="json", description="print one JSON array")


class Trainers(msgspec.Struct, frozen=True):
    """Who trains one policy."""

    policy: str
    standing: EpochState | None  # None: it never had replicas
    replicas: list[Member]
    held: bool  # whether a trainer holds the policy's writer lock
    newest: LedgerEntry | None


def main(arguments: Sequence[str]) -> int:
    settings = parse(TrainersSettings, "trainers", arguments)

    async def run(broker: Broker) -> int:
        if settings.policy:
            await check_policy(broker, settings.policy)
        policies = [settings.policy] if settings.policy else await broker.queue.readers()
        found = [await _trainers(broker, policy) for policy in policies]
        if settings.json_output:
            say_json(found)
        else:
            _show(settings.run, found, time.time())
        return 0

    return with_broker(settings, run)


async def _trainers(broker: Broker, policy: str) -> Trainers:
    members = broker.members
    return Trainers(
        policy=policy,
        standing=await members.epoch_state(policy),
        replicas=await members.members(policy),
        held=await members.is_held(policy),
        newest=await broker.queue.newest_committed(policy),
    )


def _show(run: str, found: Sequence[Trainers], now: float) -> None:
    width = None if sys.stdout.isatty() else 200  # what reads a pipe can do without broken lines
    screen = console(soft_wrap=True, width=width)
    if not found:
        screen.print(f"run {run!r}: no policy is trained yet")
    for trainers in found:
        screen.print(f"policy {trainers.policy}: {_in_words(trainers, now)}")
        table = Table.grid(padding=(0, 2))
        for place, member in enumerate(trainers.replicas):
            table.add_row("", *_row(member, now, first=place == 0))
        if trainers.replicas:
            screen.print(table)


def _in_words(trainers: Trainers, now: float) -> str:
    standing, count = trainers.standing, sum(not _is_gone(member, now) for member in trainers.replicas)
    who = f"{count} replica{'s' if count > 1 else ''}"
    if standing is not None and count:
        who += f", generation {standing.generation}, epoch {standing.epoch}"
        who += f", step {standing.open} open" if standing.open else ", no step open"
    else:
        who = "no replica is alive" if trainers.replicas else "one trainer" if trainers.held else "no trainer"
    newest = trainers.newest
    if newest is None:
        return f"{who}, no step committed yet"
    return f"{who}, step {newest.step} committed {_age(now - newest.at)} ago by {newest.replica}"


def _row(member: Member, now: float, *, first: bool) -> tuple[Any, ...]:
    name, _, life = member.id.partition(":")  # a name has none
    return (
        name,
        life[:6],
        "first" if first else "",
        f"step {member.step}" if member.step >= 0 else "no weights yet",
        f"{member.holds} groups{', voted' if member.voted else ''}",
        f"{member.trained / max(now - member.joined, 1e-3):.2f} groups/s",
        f"{'gone: last ' if _is_gone(member, now) else ''}heartbeat {_age(now - member.heartbeat)} ago",
    )


def _is_gone(member: Member, now: float) -> bool:
    return now - member.heartbeat > REPLICA_STALE_S


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

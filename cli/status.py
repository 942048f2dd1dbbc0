"""`lachesis status`: what a run is doing now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import Field
from rich.console import Console
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.keys import ARCHIVE
from lachesis.broker.records import ArchiverStatus
from lachesis.broker.retention import Kept
from lachesis.broker.server import check_server
from lachesis.broker.settings import RedisSettings
from lachesis.cli.options import parse

STALE_S = 10.0  # a heartbeat older than this is a dead server's
ARCHIVER_STALE_S = 30.0


class StatusSettings(RedisSettings):
    """Show a run: its queue, newest step, weights, servers and environments."""

    policy: str = Field("main", description="policy to show")
    json_output: bool = Field(False, alias="json", description="print one JSON object")


def main(arguments: Sequence[str]) -> int:
    settings = parse(StatusSettings, "status", arguments)
    with settings.redis() as url:
        snapshot = asyncio.run(_snapshot(url, settings))
    if settings.json_output:
        print(msgspec.json.encode(snapshot).decode())
    else:
        _show(snapshot)
    return 0


async def _snapshot(url: str, settings: StatusSettings) -> dict[str, Any]:
    broker = await Broker.connect(url, settings.run)
    try:
        return {
            "redis": await check_server(url),
            "run": settings.run,
            "policy": settings.policy,
            "trainer": await broker.parties.trainer_config(),
            "queue": await broker.queue.status(),
            "newest_step": await broker.queue.newest_committed(settings.policy),
            "newest_weights": await broker.weights.newest(settings.policy),
            "kept": await broker.queue.retention.kept(),
            "shadows": [reading for reading in await broker.queue.shadows.readings() if reading.rule],
            "archiver": await broker.queue.retention.archiver(),
            "servers": sorted(await broker.parties.servers(), key=lambda status: status.server),
            "environments": await broker.parties.envs(),
            "at": time.time(),
        }
    finally:
        await broker.aclose()


def _show(snapshot: dict[str, Any]) -> None:
    console = Console(highlight=False)
    queue, step, weights, config = (snapshot[name] for name in ("queue", "newest_step", "newest_weights", "trainer"))
    table = Table.grid(padding=(0, 2))
    table.add_row("redis", f"{snapshot['redis'].name}  {snapshot['redis'].durability}")
    table.add_row("run", f"{snapshot['run']}, policy {snapshot['policy']}")
    table.add_row(
        "trainer",
        "not registered" if config is None else f"{config.batch_size} sequences a step, {config.num_steps} steps",
    )
    if step is None:
        table.add_row("step", "none committed yet")
    else:
        table.add_row(
            "step", f"{step.step}  reward {step.reward:.3f}  lag {step.lag}  {_ago(snapshot['at'] - step.at)}"
        )
    table.add_row("weights", "none published yet" if weights is None else f"version {weights.version}  {weights.uri}")
    table.add_row(
        "queue",
        f"{queue.groups} groups, {queue.sequences} sequences, {queue.bytes:,} bytes; {queue.accepted} accepted in all",
    )
    if queue.dead or queue.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(queue.dropped.items()))
        table.add_row("dead", f"{queue.dead} groups (lachesis dead list); dropped so far: {reasons}")
    if queue.untrainable:
        table.add_row("untrainable", f"{queue.untrainable} sequences that their groups were trained without")
    kept = snapshot["kept"]
    if kept.keep_bytes or ARCHIVE in kept.covered:
        table.add_row("kept", f"{kept.batches} batches, {kept.bytes:,} bytes, steps {kept.first} to {kept.last}")
    if ARCHIVE in kept.covered:
        table.add_row("archive", _archive(kept, snapshot["archiver"], step.step if step else 0, snapshot["at"]))
    for shadow in snapshot["shadows"]:
        waits = "; no batch is formed until it has trained one" if shadow.holds else ""
        table.add_row("shadow", f"{shadow.policy}  {shadow.rule.kind}, {shadow.behind} batches behind{waits}")
    for server in snapshot["servers"]:
        age = snapshot["at"] - server.heartbeat
        state = server.state if age < STALE_S else f"silent since {_ago(age)}"
        table.add_row("server", f"{server.server}  {state}  version {server.version}  {server.last_error}".rstrip())
    for env in snapshot["environments"]:
        state = "" if env.connected else "  disconnected"
        if repeated := queue.duplicates.get(str(env.env_id)):
            state += f"  {repeated} posts dropped as repeats"
        table.add_row("environment", f"{env.env_id}  {env.name}  groups of {env.config.group_size}{state}")
    console.print(table)


def _archive(kept: Kept, archiver: ArchiverStatus | None, trained: int, now: float) -> str:
    """How far the archive is, and whether somebody writes it: until somebody does, Redis keeps what is trained."""
    done = kept.covered[ARCHIVE]
    line = f"steps up to {done}" + (f" of {trained}" if trained > done else "")
    if archiver is None:
        return f"{line}; no archiver was ever heard of"
    line += f" in {archiver.url}"
    if now - archiver.heartbeat < ARCHIVER_STALE_S:
        return f"{line}, by {archiver.who}"
    return (
        f"{line}; its archiver is silent since {_ago(now - archiver.heartbeat)}, and nothing is freed until it runs again "
        "(or `lachesis archive --stop`)"
    )


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"

"""`lachesis status`: what a run is doing now."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.records.keys import ARCHIVE
from lachesis.broker.records.registrations import ArchiverStatus, EnvRecord
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.retention.trained_batches import Kept
from lachesis.broker.run.environments import is_alive
from lachesis.broker.run.servers import is_live
from lachesis.broker.store.server import check_server
from lachesis.cli.actions import check_policy, with_broker
from lachesis.cli.health import problems, read_participants
from lachesis.cli.options import parse
from lachesis.cli.terminal import console, say_json
from lachesis.service.settings import RedisSettings

ARCHIVER_STALE_S = 30.0


class StatusSettings(RedisSettings):
    """Show a run: whether it is healthy, its queue, newest step, weights, and who of it is alive.

    Exit code 0 if it is healthy or has all its steps, 1 if it is not: no trainer, no ready server or no environment.
    """

    policy: str = Field("main", description="policy to show")
    json_output: bool = Field(False, alias="json", description="print one JSON object")


def main(arguments: Sequence[str]) -> int:
    settings = parse(StatusSettings, "status", arguments)
    snapshot = with_broker(settings, lambda broker: _snapshot(broker, settings))
    if settings.json_output:
        say_json(snapshot)
    else:
        _show(snapshot)
    return 0 if snapshot["healthy"] else 1


async def _snapshot(broker: Broker, settings: StatusSettings) -> dict[str, Any]:
    await check_policy(broker, settings.policy)
    config, newest = await broker.registry.trainer_config(), await broker.queue.newest_committed(settings.policy)
    registry = await read_participants(broker, settings.policy, newest, config, time.time())
    wrong = problems(registry)
    return {
        "redis": await check_server(broker.url),
        "run": settings.run,
        "policy": settings.policy,
        "healthy": not wrong,
        "finished": registry.finished,
        "problems": wrong,
        "trainer": config,
        "trainers": registry.trainers,
        "queue": await broker.queue.status(),
        "newest_step": newest,
        "newest_weights": await broker.weights.newest(settings.policy),
        "kept": await broker.queue.retention.kept(),
        "shadows": [reading for reading in await broker.queue.shadows.readings() if reading.rule],
        "archiver": await broker.queue.retention.archiver(),
        "servers": registry.servers,
        "environments": registry.environments,
        "at": registry.at,
    }


def _show(snapshot: dict[str, Any]) -> None:
    screen = console(width=None if sys.stdout.isatty() else 200)
    queue, step, weights, config = (snapshot[name] for name in ("queue", "newest_step", "newest_weights", "trainer"))
    table = Table.grid(padding=(0, 2))
    table.add_row("health", _health(snapshot))
    table.add_row("redis", f"{snapshot['redis'].name}  {snapshot['redis'].durability}")
    table.add_row("run", f"{snapshot['run']}, policy {snapshot['policy']}")
    plan = "not registered" if config is None else f"{config.batch_size} sequences a step, {config.num_steps} steps"
    who = ", ".join(snapshot["trainers"])
    table.add_row("trainer", f"{plan}; {f'alive: {who}' if who else 'none is alive'}")
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
    if queue.refused:
        lost = (
            f", {queue.refused_not_kept} of them only counted: Redis was nearly full" if queue.refused_not_kept else ""
        )
        table.add_row("refused", f"{queue.refused} posts (lachesis dead list --reason invalid){lost}")
    kept = snapshot["kept"]
    if kept.keep_bytes or ARCHIVE in kept.covered:
        steps = f", {kept.bytes:,} bytes, steps {kept.first} to {kept.last}" if kept.batches else ""
        table.add_row("kept", f"{kept.batches or 'no'} batches{steps}")
    if ARCHIVE in kept.covered:
        table.add_row("archive", _archive(kept, snapshot["archiver"], step.step if step else 0, snapshot["at"]))
    for shadow in snapshot["shadows"]:
        waits = "; no batch is formed until it has trained one" if shadow.holds else ""
        table.add_row("shadow", f"{shadow.policy}  {shadow.rule.kind}, {shadow.behind} batches behind{waits}")
    for server in snapshot["servers"]:
        table.add_row("server", _server(server, weights.version if weights else None, snapshot["at"]))
    for env in snapshot["environments"]:
        table.add_row("environment", _environment(env, queue.duplicates.get(str(env.env_id), 0), snapshot["at"]))
    screen.print(table)


def _health(snapshot: dict[str, Any]) -> str:
    if snapshot["finished"]:
        return f"finished: all {snapshot['trainer'].num_steps} steps are trained"
    return "healthy" if snapshot["healthy"] else f"NOT healthy: {'; '.join(snapshot['problems'])}"


def _server(server: ServerStatus, newest: int | None, now: float) -> str:
    if not is_live(server, now):
        return f"{server.server}  gone: silent since {_ago(now - server.heartbeat)}; it served version {server.version}"
    behind = f" of {newest}" if newest is not None and newest != server.version else ""
    rule = "" if server.rule == "newest" else f"  ({server.rule})"
    return f"{server.server}  {server.state}  version {server.version}{behind}{rule}  {server.last_error}".rstrip()


def _environment(env: EnvRecord, repeated: int, now: float) -> str:
    state = f"heard {_ago(now - env.heard_at)}"
    if not env.connected:
        state = "signed off"
    elif not is_alive(env, now):
        state = f"gone: silent since {_ago(now - env.heard_at)}"
    dropped = f"  {repeated} posts dropped as repeats" if repeated else ""
    return f"{env.env_id}  {env.name}  groups of {env.config.group_size}  {state}{dropped}"


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
    seconds = max(0.0, seconds)  # clocks differ
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"

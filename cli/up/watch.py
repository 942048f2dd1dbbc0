"""Keeps the view of a run up to date from the metrics stream, the pools and the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

from lachesis.broker.client import Broker
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.run.servers import is_live
from lachesis.cli.commands.entries import env_scores
from lachesis.cli.commands.pool import describe
from lachesis.cli.up.progress import View
from lachesis.cli.up.supervisor import Supervisor

POOL = "main"  # whose servers `lachesis up` starts
STEP_TAKES = ("trainer", "shim", "front-door", "env")  # parts that each step is the work of


async def watch(broker: Broker, view: View, supervisor: Supervisor, look_around: Callable[[], None]) -> None:
    """Runs until cancelled; `look_around` is called twice a second."""
    cursor = "0-0"
    view.step = committed = await _committed(broker)
    while True:
        look_around()
        entries = await broker.journal.metrics(cursor)
        for _, fields in entries:
            with contextlib.suppress(KeyError, ValueError):  # another release's, which told other fields
                take(view, fields)
        if view.step > committed:
            committed = view.step
            supervisor.of_use(*STEP_TAKES)
        cursor = entries[-1][0] if entries else cursor
        servers = {server.server: server for server in await broker.registry.servers()}
        fresh = [server for server in servers.values() if is_live(server, time.time())]
        view.served = min((server.version for server in fresh), default=-1)
        view.queue = (await broker.queue.status()).groups
        supervisor.of_use(*(server.server for server in fresh if server.state == "ready"))
        view.warnings = await _warnings(broker, fresh)
        states = {name: part.state for name, part in supervisor.parts.items() if name != "base-model"}
        for name in states:
            server = servers.get(name)
            if server in fresh and server is not None and states[name] == "running":
                states[name] = server.state
        view.parts = states
        await asyncio.sleep(0.5)


async def _committed(broker: Broker) -> int:
    newest = await broker.queue.newest_committed("main")
    return newest.step if newest else 0


async def _warnings(broker: Broker, servers: Sequence[ServerStatus]) -> list[str]:
    """What keeps the servers from the newest version."""
    _, rule = await broker.pools.rule(POOL)
    found = [] if rule.mode == "newest" else [f"pool {POOL}: {describe(rule)}"]
    newest = await broker.weights.newest("main")
    for server in servers:
        wanted = newest is not None and rule.mode == "newest" and server.version < newest.version
        if server.last_error and (wanted or rule.mode != "newest" or server.state not in ("ready", "updating")):
            found.append(f"{server.server} ({server.state}, version {server.version}): {server.last_error}")
    return found


def take(view: View, fields: Mapping[str, str]) -> None:
    """Show one entry of the metrics, if it is of a kind that is shown."""
    if fields["kind"] == "step":
        take_step(view, fields)
    elif fields["kind"] == "eval":
        view.held_out.append((int(fields["version"]), float(fields["accuracy"])))


def take_step(view: View, fields: Mapping[str, str]) -> None:
    """Show one entry of kind "step"."""
    view.step = int(fields["step"])
    view.version = int(fields["version"])
    view.lag = int(fields["lag"])
    view.reward = float(fields["reward"])
    view.rewards.append(view.reward)
    view.scores = env_scores(fields)
    view.tokens_per_s = float(fields["tokens_per_s"])
    view.wait_share = float(fields["wait_share"])

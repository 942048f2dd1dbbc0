"""Which inference servers live, told by their heartbeats. The front door routes by a shorter time and a clock of its own."""

from __future__ import annotations

from collections.abc import Iterable

from lachesis.broker.records.versions import ServerStatus

SERVER_SILENT_S = 10.0  # a server without a heartbeat for so long is taken for dead


def is_live(server: ServerStatus, now: float) -> bool:
    """Whether its heartbeat is new at `now`, seconds since the epoch by the caller's clock."""
    return now - server.heartbeat < SERVER_SILENT_S


def live_names(servers: Iterable[ServerStatus], now: float) -> set[str]:
    """Of the servers that live, without those whose clocks are so far ahead that they would outlive their death by more."""
    return {server.server for server in servers if is_live(server, now) and server.heartbeat - now < SERVER_SILENT_S}

"""Which weight versions made a posted group: Atropos environments do not say, so it is joined or bounded here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from lachesis.broker import Broker
from lachesis.broker.codec import from_entry, tokens_digest
from lachesis.broker.records import Lineage, ServerStatus, TrainerConfig, WeightsEntry

HEARTBEAT_S = 60.0  # a server not heard of for longer serves nobody
REMEMBERED_S = 60.0  # a generation may have begun on a version that its server has replaced since


class Arrival(NamedTuple):
    """What the run knew when a group arrived."""

    trainer: TrainerConfig | None
    lineages: list[Lineage | None]  # per sequence
    newest: int  # version of the policy
    servers: list[bytes]  # ServerStatus each, JSON: only needed where a lineage is missing


class Versions:
    """Version spans of groups, from the front door's lineage where it knows a sequence."""

    def __init__(self, broker: Broker, policy: str) -> None:
        self.joined = self.unknown = 0  # sequences
        self._broker, self._policy = broker, policy
        self._served: deque[tuple[float, int]] = deque()  # (when seen, oldest version served then)

    async def arrival(self, sequences: Sequence[np.ndarray]) -> Arrival:
        """What Redis says of these sequences and of the run, in one trip."""
        keys = self._broker.keys
        lineages = [keys.lineage(tokens_digest(tokens)) for tokens in sequences]
        config, newest, servers, found = await self._broker.scripts.arrive(
            keys=[keys.trainers, keys.weights(self._policy), keys.pools, *lineages]
        )
        return Arrival(
            msgspec.json.decode(config, type=TrainerConfig) if config else None,
            [msgspec.json.decode(raw, type=Lineage) if raw else None for raw in found],
            _version(newest[0][1]) if newest else 0,
            servers,
        )

    def span(self, arrival: Arrival) -> tuple[int, int]:
        """(oldest, newest) version that produced tokens of what arrived; bounds where lineage is not known.

        Bounds: newest is the policy's newest version, oldest what the slowest server served of late.
        """
        spans = [(lineage.v_min, lineage.v_max) for lineage in arrival.lineages if lineage]
        missing = len(arrival.lineages) - len(spans)
        self.joined += len(spans)
        self.unknown += missing
        if missing:
            spans.append(self._bounds(arrival))
        return min(oldest for oldest, _ in spans), max(newest for _, newest in spans)

    async def newest(self) -> int:
        """The policy's newest version; 0, the base weights, before the first is published."""
        found = await self._broker.weights.newest(self._policy)
        return found.version if found else 0

    def _bounds(self, arrival: Arrival) -> tuple[int, int]:
        newest, now = arrival.newest, time.time()
        servers = [msgspec.json.decode(raw, type=ServerStatus) for raw in arrival.servers]
        versions = [
            server.version for server in servers if server.version >= 0 and now - server.heartbeat < HEARTBEAT_S
        ]
        if versions:
            self._served.append((now, min(versions)))
        while self._served and now - self._served[0][0] > REMEMBERED_S:
            self._served.popleft()
        oldest = min((version for _, version in self._served), default=newest)
        return min(oldest, newest), newest


def _version(fields: Sequence[bytes]) -> int:
    """Of an entry as a script returns it: fields and values in turn."""
    return from_entry(WeightsEntry, dict(zip(fields[::2], fields[1::2], strict=True))).version

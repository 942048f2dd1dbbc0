"""Which weight versions made a posted group: Atropos environments do not say, so it is joined or bounded here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from lachesis.broker import Broker
from lachesis.broker.codec import tokens_digest

HEARTBEAT_S = 60.0  # a server not heard of for longer serves nobody
REMEMBERED_S = 60.0  # a generation may have begun on a version that its server has replaced since


class Versions:
    """Version spans of groups, from the front door's lineage where it knows a sequence."""

    def __init__(self, broker: Broker, policy: str) -> None:
        self.joined = self.unknown = 0  # sequences
        self._broker, self._policy = broker, policy
        self._served: deque[tuple[float, int]] = deque()  # (when seen, oldest version served then)

    async def span(self, sequences: Sequence[Sequence[int]]) -> tuple[int, int]:
        """(oldest, newest) version that produced tokens of these sequences; bounds where lineage is not known.

        Bounds: newest is the policy's newest version, oldest what the slowest server served of late.
        """
        known = await self._broker.lineage.look_up([tokens_digest(tokens) for tokens in sequences])
        spans = [(lineage.v_min, lineage.v_max) for lineage in known if lineage]
        self.joined += len(spans)
        self.unknown += len(known) - len(spans)
        if len(spans) < len(known):
            spans.append(await self._bounds())
        return min(oldest for oldest, _ in spans), max(newest for _, newest in spans)

    async def newest(self) -> int:
        """The policy's newest version; 0, the base weights, before the first is published."""
        found = await self._broker.weights.newest(self._policy)
        return found.version if found else 0

    async def _bounds(self) -> tuple[int, int]:
        newest, now = await self.newest(), time.time()
        versions = [
            server.version
            for server in await self._broker.parties.servers()
            if server.version >= 0 and now - server.heartbeat < HEARTBEAT_S
        ]
        if versions:
            self._served.append((now, min(versions)))
        while self._served and now - self._served[0][0] > REMEMBERED_S:
            self._served.popleft()
        oldest = min((version for _, version in self._served), default=newest)
        return min(oldest, newest), newest

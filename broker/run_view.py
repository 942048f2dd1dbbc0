"""What every part of a run's broker needs: the connections, the scripts and the names of the keys."""

from __future__ import annotations

from dataclasses import dataclass

from lachesis.broker.records.keys import Keys
from lachesis.broker.store.connection import Redis
from lachesis.broker.store.multiplexed import MultiplexedConnection
from lachesis.broker.store.scripts import Scripts


@dataclass(frozen=True)
class RunView:
    """One run, as seen over connections that all runs share."""

    redis: Redis
    blocking: Redis  # for reads that wait
    heartbeats: Redis  # which must not wait for a connection
    multiplexed: MultiplexedConnection
    scripts: Scripts
    keys: Keys

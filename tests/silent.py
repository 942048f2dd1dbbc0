"""Environments that fall silent, without the wait."""

from __future__ import annotations

import time

from lachesis.broker import Broker
from lachesis.broker.run.environments import ALIVE_S


async def silence(broker: Broker, env_id: int) -> None:
    """As if the environment had not called for as long as one that is alive may."""
    await broker.redis.zadd(broker.keys.heard, {str(env_id): (time.time() - ALIVE_S) * 1000})
    await broker.redis.hincrby(broker.keys.envs, "changes", 1)

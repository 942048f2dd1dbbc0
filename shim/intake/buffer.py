"""What upstream calls a buffer: sequences in groups of another size than their environment's."""

from __future__ import annotations

import structlog
from redis.exceptions import RedisError

from lachesis.broker import Broker
from lachesis.broker.store.connection import patience
from lachesis.broker.store.redis_errors import describe

STATUS_PATIENCE_S = 1.0  # what only tells of the queue waits this long for a Redis in trouble

log = structlog.get_logger(role="shim")


async def buffered(broker: Broker, env_id: int | None, sequences: int) -> int | None:
    """What upstream calls `buffer_size`, where a group of `sequences` is of another size than its environment's.

    That is how many sequences in such groups wait, less those that make up groups of its size: 0 if these just did.
    None also where Redis can't tell any more: the group is stored, and its sender must hear nothing else.
    """
    try:
        with patience(STATUS_PATIENCE_S):
            env = None if env_id is None else await broker.registry.touch_env(env_id)
            return None if env is None or env.config.group_size == sequences else await broker.queue.odd_sequences(env)
    except RedisError as error:
        log.warning("stored, but its buffer could not be counted", env=env_id, reason=describe(error))
        return None

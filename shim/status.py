"""`/status`, `/status-env`, `/healthz`: from counters alone, however long the queue is."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lachesis.broker import Broker
from lachesis.broker.records import EnvRecord, QueueStatus, TrainerConfig
from lachesis.shim.bodies import decode, read_body

MIN_ENV_WEIGHT = 0.01
REDIS_S = 2.0  # a health check waits this long for Redis


class EnvIdentifier(Struct):
    """Body of `/status-env` and `/disconnect-env`."""

    env_id: int


async def current_step(broker: Broker, status: QueueStatus | None = None) -> int:
    """Steps delivered, plus those that the registered trainer had behind it when it came to this run."""
    status = status or await broker.queue.status()
    return status.delivered + int(await broker.redis.hget(broker.keys.trainers, "step_offset") or 0)


def env_status(
    env_id: int, envs: Sequence[EnvRecord], queue: QueueStatus, config: TrainerConfig | None
) -> dict[str, Any]:
    """What `/status-env` tells one environment, less `current_step`; sizes in groups of that environment's size.

    Upstream's formulas (atroposlib/api/server.py, get_status_env), on counters. An environment that is not known,
    because its run was reset, gets an answer that lets it go on.
    """
    env = next((env for env in envs if env.env_id == env_id), None)
    connected = [env for env in envs if env.connected]
    minimums = {env.env_id: env.config.min_batch_allocation or 0.0 for env in connected}
    largest = max(queue.sizes, default=1)
    own = queue.env_sequences.get(str(env_id), 0)

    batch_size = config.batch_size if config else 0
    others = queue.sequences - sum(queue.env_sequences.values())  # in formed batches that no trainer has yet
    for name, sequences in queue.env_sequences.items():
        if name != str(env_id):
            packed = math.ceil(sequences / largest) * largest
            reserved = int(batch_size * minimums.get(int(name), 0.0)) if name != "-" else 0
            others += max(0, packed - reserved)

    group_size = max(1, env.config.group_size) if env else largest
    return {
        "queue_size": (own + others) // group_size,
        "unallocated_fraction": 1.0 - min(sum(minimums.values()), 1.0),
        "self_queue_size": own // group_size,
        "max_group_size": largest,
        "env_weight": _weight(env, connected),
    }


def _weight(env: EnvRecord | None, connected: Sequence[EnvRecord]) -> float:
    def share(env: EnvRecord) -> float:
        return env.config.max_token_length * max(0.0, env.config.weight)

    total = sum(map(share, connected))
    return max(MIN_ENV_WEIGHT, share(env) / total) if env and total > 0 else 1.0


class StatusRoutes:
    def __init__(self, broker: Broker, counts: Callable[[], dict[str, Any]], max_body_bytes: int) -> None:
        self._broker, self._counts, self._max_body_bytes = broker, counts, max_body_bytes

    async def status(self, _: Request) -> Response:
        queue = await self._broker.queue.status()
        return JSONResponse({"current_step": await current_step(self._broker, queue), "queue_size": queue.groups})

    async def status_env(self, request: Request) -> Response:
        env_id = decode(EnvIdentifier, await read_body(request, self._max_body_bytes)).env_id
        queue = await self._broker.queue.status()
        parties = self._broker.parties
        told = env_status(env_id, await parties.envs(), queue, await parties.trainer_config())
        return JSONResponse({"current_step": await current_step(self._broker, queue), **told})

    async def healthz(self, _: Request) -> Response:
        """200 while Redis answers, else 503; with what the run dropped, and the counts of this process since it started."""
        told = {"run": self._broker.keys.run, **self._counts()}
        try:
            queue = await asyncio.wait_for(self._broker.queue.status(), REDIS_S)
        except (TimeoutError, RedisError, OSError):
            return JSONResponse({"status": "no redis", **told}, 503)
        return JSONResponse({"status": "ok", **told, "dead": queue.dead, "dropped": queue.dropped})

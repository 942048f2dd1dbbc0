"""`/status`, `/status-env`, `/healthz`, `/runs`: from counters alone, however long the queue is."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, cast

from msgspec import Struct
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import Response

from lachesis.broker import Broker
from lachesis.broker.queue.counters import read_status
from lachesis.broker.records.entries import read_json, read_number
from lachesis.broker.records.registrations import EnvRecord, TokenRecord, TrainerConfig
from lachesis.broker.records.steps import QueueStatus
from lachesis.broker.run.environments import Alive, share
from lachesis.broker.store.connection import patience
from lachesis.broker.store.redis_errors import Trouble, describe, trouble
from lachesis.service.http.access import Access
from lachesis.shim.errors import retry_after
from lachesis.shim.http.access import account_of, caller_of, environment_of
from lachesis.shim.http.answers import EnvStatus, Greeting, Health, Run, RunList, RunStatus, answer
from lachesis.shim.http.body import read_body
from lachesis.shim.intake.intake import STATUS_PATIENCE_S
from lachesis.shim.intake.json_bodies import decode

MIN_ENV_WEIGHT = 0.01
REDIS_S = 2.0  # a health check waits this long for Redis
KNOWN_S = 300.0  # and then tells what it knew, if that is no older
KNOWN_ENVS = 4096


class EnvIdentifier(Struct):
    """Body of `/status-env` and `/disconnect-env`."""

    env_id: int


async def current_step(broker: Broker, status: QueueStatus | None = None) -> int:
    """Steps delivered, plus those that the registered trainer had behind it when it came to this run."""
    status = status or await broker.queue.status()
    return status.delivered + read_number(await broker.redis.hget(broker.keys.trainers, "step_offset"))


def env_status(
    env: EnvRecord | None, account: str, alive: Alive, queue: QueueStatus, config: TrainerConfig | None
) -> dict[str, Any]:
    """What `/status-env` tells one environment, less `current_step`; sizes in groups of that environment's size.

    Upstream's formulas (atroposlib/api/server.py, get_status_env), on counters, and without environments that have
    fallen silent. An environment that is not known, because its run was reset, gets an answer that lets it go on.
    `account` is what its groups are counted under.
    """
    minimums = alive.minimums
    largest = max((size for sizes in queue.waiting.values() for size in sizes), default=1)
    waiting = {
        name: sum(size * count for size, count in sizes.items()) for name, sizes in queue.waiting.items()
    }  # sequences

    batch_size = config.batch_size if config else 0
    others = queue.sequences - sum(waiting.values())  # in formed batches that no trainer has yet
    own = waiting.pop(account, 0)
    for name, sequences in waiting.items():
        packed = math.ceil(sequences / largest) * largest
        others += max(0, packed - int(batch_size * minimums.get(name, 0.0)))

    group_size = max(1, env.config.group_size) if env else largest
    return {
        "queue_size": (own + others) // group_size,
        "unallocated_fraction": 1.0 - min(alive.allocated, 1.0),
        "self_queue_size": own // group_size,
        "max_group_size": largest,
        "env_weight": _weight(env, alive),
    }


def _weight(env: EnvRecord | None, alive: Alive) -> float:
    total = alive.total
    return max(MIN_ENV_WEIGHT, share(env) / total) if env and total > 0 else 1.0


async def greet(_: Request) -> Response:
    return answer(Greeting("AtroposLib API"))


class StatusRoutes:
    def __init__(
        self, broker: Broker, access: Access, counts: Callable[[], dict[str, Any]], max_body_bytes: int
    ) -> None:
        self._broker, self._access, self._counts, self._max_body_bytes = broker, access, counts, max_body_bytes
        self._known: dict[tuple[int, str], tuple[float, EnvStatus]] = {}  # by environment and token: when, what

    async def status(self, _: Request) -> Response:
        queue = await self._broker.queue.status()
        return answer(RunStatus(await current_step(self._broker, queue), queue.groups))

    async def status_env(self, request: Request) -> Response:
        """Served from what was known, for a while, where Redis is in trouble: an environment exits when this fails."""
        env_id = decode(EnvIdentifier, await read_body(request, self._max_body_bytes)).env_id
        caller = caller_of(request)
        asked = env_id, caller.name if caller else ""
        try:
            with patience(STATUS_PATIENCE_S):
                found = await self._status_env(env_id, caller)
        except RedisError as error:
            if trouble(error) is None:
                raise
            known_at, known = self._known.get(asked, (float("-inf"), None))
            recent = known if time.monotonic() - known_at <= KNOWN_S else None
            found = recent or await self._status_env(env_id, caller)
        else:
            self._known.pop(asked, None)
            self._known[asked] = time.monotonic(), found
            if len(self._known) > KNOWN_ENVS:
                del self._known[next(iter(self._known))]
        return answer(found)

    async def _status_env(self, env_id: int, caller: TokenRecord | None) -> EnvStatus:
        env = await environment_of(self._broker, caller, env_id)
        keys, environments = self._broker.keys, self._broker.registry.environments
        async with self._broker.redis.pipeline(transaction=False) as pipe:  # every environment asks ten times a second
            pipe.hgetall(keys.state)
            pipe.hmget(keys.trainers, ["config", "step_offset"])
            environments.ask(pipe)
            state, (config, offset), *called = await pipe.execute()
        queue = read_status(state)
        trainer = read_json(TrainerConfig, config)
        told = env_status(env, account_of(caller, env, env_id), await environments.take(called), queue, trainer)
        return EnvStatus(current_step=queue.delivered + read_number(offset), **told)

    async def healthz(self, request: Request) -> Response:
        """200 while Redis takes groups, else 503.

        To who may read the run also why, what it dropped, and counts of this process.
        """
        health = Health(run=self._broker.keys.run, status="ok", **self._counts())
        code, headers = 200, {}
        try:
            queue = await asyncio.wait_for(self._look(), REDIS_S)
            health.dead, health.dropped, health.duplicates = queue.dead, queue.dropped, queue.duplicates
        except (TimeoutError, RedisError, OSError) as error:
            kind = trouble(error) or Trouble.LOST
            code, headers = 503, {"Retry-After": retry_after(kind)}
            health.status, health.reason = cast(Any, kind.value), describe(error)
        may_read = await self._access.may_read(request.headers.get("authorization", ""))
        return answer(health if may_read else Health(status=health.status), code, headers)

    async def runs(self, _: Request) -> Response:
        return answer(RunList([Run(run, since) for run, since in (await self._broker.runs()).items()]))

    async def _look(self) -> QueueStatus:
        with patience(STATUS_PATIENCE_S):
            await self._broker.probe()
            return await self._broker.queue.status()

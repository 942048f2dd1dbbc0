"""Who of a run is alive, and what is wrong with it: judged by heartbeats, locks and when somebody last called."""

from __future__ import annotations

import msgspec

from lachesis.broker.client import Broker
from lachesis.broker.records.registrations import EnvRecord, TrainerConfig
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.run.environments import is_alive
from lachesis.broker.run.servers import is_live

REPLICA_STALE_S = (
    30.0  # a replica that beat earlier is dead; the others of its policy take it out before that, if there are any
)
HTTP_TRAINER_S = 60.0  # a trainer that calls over HTTP is alive for so long after it called


class Participants(msgspec.Struct, frozen=True):
    """Of one policy of a run."""

    trainers: list[str]  # alive now, in words
    servers: list[ServerStatus]
    environments: list[EnvRecord]
    finished: bool  # every step that was asked for is committed
    at: float


async def read_participants(broker: Broker, policy: str, newest: LedgerEntry | None, config: TrainerConfig | None, now: float) -> Participants:  # fmt: skip
    return Participants(
        trainers=await _trainers(broker, policy, newest, now),
        servers=sorted(await broker.registry.servers(), key=lambda status: status.server),
        environments=await broker.registry.envs(),
        finished=config is not None and newest is not None and newest.step >= config.num_steps,
        at=now,
    )


async def _trainers(broker: Broker, policy: str, newest: LedgerEntry | None, now: float) -> list[str]:
    members = await broker.members.members(policy)
    alive = [member.id.partition(":")[0] for member in members if now - member.heartbeat < REPLICA_STALE_S]
    if alive:
        return [f"replica {name}" for name in alive]
    if await broker.members.is_held(policy):
        return [newest.replica if newest and not newest.replica.startswith("http:") else "a trainer"]
    called = await broker.redis.hgetall(broker.keys.trainers)
    return [
        name.decode() for name, at in called.items() if name.startswith(b"http:") and now - float(at) < HTTP_TRAINER_S
    ]


def serves(server: ServerStatus, now: float) -> bool:
    """Whether it takes requests, now or in a moment."""
    return is_live(server, now) and server.state in ("ready", "updating")


def problems(registry: Participants) -> list[str]:
    """What keeps the run from going on, a line each; nothing is wrong with one that has all its steps."""
    if registry.finished:
        return []
    found = [] if registry.trainers else ["no trainer is alive"]
    if registry.servers and not any(serves(server, registry.at) for server in registry.servers):
        found.append("no server is ready")
    if not any(is_alive(env, registry.at) for env in registry.environments):
        found.append("no environment is alive")
    return found

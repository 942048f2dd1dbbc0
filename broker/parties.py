"""Who takes part: the trainer's registration, environments, inference servers, and the writer lock of a policy."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
from msgspec import structs
from redis.asyncio.lock import Lock
from redis.exceptions import LockNotOwnedError

from lachesis.broker.connection import Redis
from lachesis.broker.keys import Keys
from lachesis.broker.lua import Scripts
from lachesis.broker.records import EnvConfig, EnvRecord, KeptConfiguration, ServerStatus, TrainerConfig

ALIVE_S = 60.0  # an environment silent for longer counts for nothing; environments call ten times a second
TRAINER = "trainer:"  # before the policy's name, in the hash `settings`
HEARD_EVERY_S = 5.0  # that an environment called is noted at most so often


class WriterLock(Lock):
    """redis-py's lock, safe where a reply is lost, and to be had while Redis is full."""

    def __init__(self, redis: Redis, scripts: Scripts, name: str, ttl_s: float) -> None:
        super().__init__(redis, name, timeout=ttl_s, sleep=min(1.0, ttl_s / 5), thread_local=False)
        self._scripts, self._ttl_ms = scripts, int(ttl_s * 1000)

    async def do_acquire(self, token: str | bytes) -> bool:
        return bool(await self._scripts.acquire(keys=[self.name], args=[token, self._ttl_ms], client=self.redis))

    async def do_release(self, expected_token: bytes) -> None:
        try:
            await super().do_release(expected_token)
        except LockNotOwnedError:  # sent twice, or come late: either way it is not ours any more
            return


class Parties:
    """Registrations and heartbeats of one run; they outlive the processes that serve them."""

    def __init__(self, redis: Redis, heartbeats: Redis, scripts: Scripts, keys: Keys) -> None:
        self._redis, self._heartbeats, self._scripts, self._keys = redis, heartbeats, scripts, keys
        self._heard: dict[int, EnvRecord] = {}

    # -- trainer --------------------------------------------------------------------------------------------------

    async def register_trainer(self, config: TrainerConfig) -> None:
        """Set the run's registration. Who may replace whose is the caller's to decide."""
        await self._scripts.note(keys=[self._keys.trainers], args=["config", msgspec.json.encode(config)])

    async def adopt(self, earlier: TrainerConfig | None, config: TrainerConfig, *, step_offset: int) -> bool:
        """Register `config` if `earlier` is still the registration; False if another took its place meanwhile."""
        judged = "" if earlier is None else msgspec.json.encode(earlier)
        args = [judged, msgspec.json.encode(config), step_offset]
        return bool(await self._scripts.adopt(keys=[self._keys.trainers], args=args))

    async def trainer_config(self) -> TrainerConfig | None:
        raw = await self._redis.hget(self._keys.trainers, "config")
        return msgspec.json.decode(raw, type=TrainerConfig) if raw else None

    async def keep_configuration(self, policy: str, kept: KeptConfiguration) -> None:
        """Say what the policy is trained with from now on."""
        await self._scripts.note(keys=[self._keys.settings], args=[f"{TRAINER}{policy}", msgspec.json.encode(kept)])

    async def configurations(self) -> dict[str, KeptConfiguration]:
        """What each policy was last trained with."""
        raw = await self._redis.hgetall(self._keys.settings)
        return {
            name.decode().removeprefix(TRAINER): msgspec.json.decode(value, type=KeptConfiguration)
            for name, value in raw.items()
            if name.startswith(TRAINER.encode())
        }

    async def start(self) -> None:
        """A trainer has asked for its first batch: environments may begin."""
        await self._scripts.note(keys=[self._keys.trainers], args=["started", "1"])

    async def halt(self) -> None:
        """The next trainer is still to come: environments that register before it asks for a batch wait for it."""
        await self._redis.hdel(self._keys.trainers, "started")

    async def started(self) -> bool:
        return bool(await self._redis.hexists(self._keys.trainers, "started"))

    def writer(self, policy: str, *, ttl_s: float) -> WriterLock:
        """The lock whose holder alone may commit and publish for `policy`; its token fences a predecessor off."""
        return WriterLock(self._heartbeats, self._scripts, self._keys.writer(policy), ttl_s)

    # -- environments ---------------------------------------------------------------------------------------------

    async def register_env(self, config: EnvConfig, nonce: str) -> EnvRecord:
        """Give the environment an id. The same `nonce` gets the same id, so a resent request registers once."""
        record = EnvRecord(env_id=-1, name="", config=config, registered_at=time.time())
        env_id = await self._scripts.register_env(
            keys=[self._keys.envs], args=[nonce, config.desired_name, msgspec.json.encode(record)]
        )
        self._heard.pop(int(env_id), None)
        found = await self.env(int(env_id))
        if found is None:
            raise LookupError(f"environment {env_id} vanished while it registered: the run was reset")
        return found

    async def env(self, env_id: int) -> EnvRecord | None:
        values = await self._redis.hmget(self._keys.envs, [str(env_id), f"heard:{env_id}"])
        return _env(*values) if values[0] else None

    async def envs(self) -> list[EnvRecord]:
        """All environments ever registered, by id; judge them by `is_alive`."""
        return read_envs(await self._redis.hgetall(self._keys.envs))

    async def hear(self, env_id: int) -> EnvRecord | None:
        """An environment called: note when, and say who it is, as of a few seconds ago; None if it is not registered."""
        now = time.time()
        known = self._heard.get(env_id)
        if known and 0 <= now - known.heard_at < HEARD_EVERY_S:
            return known
        if (found := await self.env(env_id)) is not None:
            await self._scripts.note(keys=[self._keys.envs], args=[f"heard:{env_id}", f"{now:.3f}"])
            self._heard[env_id] = structs.replace(found, heard_at=now)
        return found

    async def update_env(self, record: EnvRecord) -> None:
        await self._scripts.note(keys=[self._keys.envs], args=[str(record.env_id), msgspec.json.encode(record)])

    def forget_envs(self) -> None:
        """The run was reset: ids are given out anew."""
        self._heard.clear()

    # -- inference servers ----------------------------------------------------------------------------------------

    async def report(self, status: ServerStatus) -> None:
        """Heartbeat of an inference server."""
        await self._scripts.note(
            keys=[self._keys.pools], args=[status.server, msgspec.json.encode(status)], client=self._heartbeats
        )

    async def withdraw(self, server: str) -> None:
        await self._redis.hdel(self._keys.pools, server)

    async def servers(self, pool: str | None = None) -> list[ServerStatus]:
        """All inference servers ever heard of and not withdrawn; judge them by `heartbeat`."""
        raw = await self._redis.hvals(self._keys.pools)
        found = [msgspec.json.decode(value, type=ServerStatus) for value in raw]
        return [status for status in found if pool is None or status.pool == pool]


def is_alive(env: EnvRecord, now: float) -> bool:
    """Whether the environment has a share in weights and batches: it is connected, and called within ALIVE_S."""
    return env.connected and now - env.heard_at < ALIVE_S


def read_envs(raw: Mapping[bytes, bytes]) -> list[EnvRecord]:
    """The environments in the hash `envs`, by id."""
    records = [_env(value, raw.get(b"heard:" + key)) for key, value in raw.items() if key.isdigit()]
    return sorted(records, key=lambda record: record.env_id)


def _env(record: bytes, heard: bytes | None) -> EnvRecord:
    env = msgspec.json.decode(record, type=EnvRecord)
    return structs.replace(env, heard_at=float(heard) if heard else env.registered_at)

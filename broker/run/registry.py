"""Who takes part: the trainer's registration, environments, inference servers, and the writer lock of a policy."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
from msgspec import structs
from redis.exceptions import RedisError

from lachesis.broker.errors import ConfigurationError, LimitReached
from lachesis.broker.records.entries import read_json
from lachesis.broker.records.registrations import EnvConfig, EnvRecord, KeptConfiguration, TokenRecord, TrainerConfig
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.run.environments import CHANGES, Environments, may_act_for, read_env
from lachesis.broker.run.writer_lock import WriterLock
from lachesis.broker.run_view import RunView
from lachesis.broker.store.connection import patience
from lachesis.broker.store.redis_errors import trouble

TRAINER = "trainer:"  # before the policy's name, in the hash `settings`
HEARD_EVERY_S = 5.0  # that an environment called is noted at most so often
MOST_HEARD = 10_000  # environments that a process remembers to have noted
REPLACED_VERSION_S = 300.0  # a version that a server replaced so long ago may have begun a generation
REGISTRATION_ONCE_S = 300  # a registration is not sent again after so long
MOST_ENVS = 10_000  # that a run knows
FORGOTTEN_S = 24 * 3600.0  # an environment that was silent for so long is forgotten
CROWDED_S = 600.0  # and where there is no room, the longest silent one after this
NAME_CHARACTERS = 200
PRINTABLE = f"must be at most {NAME_CHARACTERS} printable characters"
TEXT_BYTES = 1024  # of an error that a server tells


def check_printable(kind: str, name: str) -> str:
    """Return `name` if it can stand in a line that people read, else raise ConfigurationError."""
    if len(name) > NAME_CHARACTERS or not name.isprintable():
        raise ConfigurationError(f"{kind} = {name[:NAME_CHARACTERS]!r}: {PRINTABLE}")
    return name


class Registry:
    """Registrations and heartbeats of one run; they outlive the processes that serve them."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self.environments = Environments(view)
        self._heard: dict[int, tuple[float, EnvRecord]] = {}  # when it was noted, by our clock

    # -- trainer --------------------------------------------------------------------------------------------------

    async def register_trainer(self, config: TrainerConfig) -> None:
        """Set the run's registration. Who may replace whose is the caller's to decide."""
        await self._view.scripts.set_fields(
            keys=[self._view.keys.trainers], args=["config", msgspec.json.encode(config)]
        )

    async def adopt(self, judged: bytes | None, config: TrainerConfig, *, step_offset: int) -> bool:
        """Register `config` if the registration is still the one `judged`, as it is kept; False if another took its place."""
        args = [judged or b"", msgspec.json.encode(config), step_offset]
        return bool(await self._view.scripts.replace_registration(keys=[self._view.keys.trainers], args=args))

    async def registration(self) -> bytes:
        """The trainer's registration as it is kept; empty if there is none."""
        return bytes(await self._view.redis.hget(self._view.keys.trainers, "config") or b"")

    async def trainer_config(self) -> TrainerConfig | None:
        return read_json(TrainerConfig, await self.registration())

    async def keep_configuration(self, policy: str, kept: KeptConfiguration) -> None:
        """Say what the policy is trained with from now on."""
        await self._view.scripts.set_fields(
            keys=[self._view.keys.settings], args=[f"{TRAINER}{policy}", msgspec.json.encode(kept)]
        )

    async def configurations(self) -> dict[str, KeptConfiguration]:
        """What each policy was last trained with."""
        raw = await self._view.redis.hgetall(self._view.keys.settings)
        found = {
            name.decode(errors="replace").removeprefix(TRAINER): read_json(KeptConfiguration, value)
            for name, value in raw.items()
            if name.startswith(TRAINER.encode())
        }
        return {policy: kept for policy, kept in found.items() if kept}

    async def start(self) -> None:
        """A trainer has asked for its first batch: environments may begin."""
        await self._view.scripts.set_fields(keys=[self._view.keys.trainers], args=["started", "1"])

    async def halt(self) -> None:
        """The next trainer is still to come: environments that register before it asks for a batch wait for it."""
        await self._view.redis.hdel(self._view.keys.trainers, "started")

    async def started(self) -> bool:
        return bool(await self._view.redis.hexists(self._view.keys.trainers, "started"))

    async def note_trainer_call(self, consumer: str, policy: str, *, most: int, crowded_s: float) -> bool:
        """The HTTP trainer called. False if `most` are known, it is none of them, and all called within `crowded_s`."""
        keys = [self._view.keys.trainers, self._view.keys.batches]
        args = [consumer, f"{time.time():.3f}", policy, most, crowded_s]
        return bool(await self._view.scripts.note_trainer_call(keys=keys, args=args))

    def writer(self, policy: str, *, ttl_s: float) -> WriterLock:
        """The lock whose holder alone may commit and publish for `policy`; its token fences a predecessor off."""
        return WriterLock(self._view.heartbeats, self._view.scripts, self._view.keys, policy, ttl_s)

    # -- environments ---------------------------------------------------------------------------------------------

    async def register_env(self, config: EnvConfig, nonce: str, owner: str = "") -> EnvRecord:
        """Give the environment an id, for the token `owner`. The same `nonce` gets the same id, so a resent request registers once.

        Raises LimitReached where the run knows as many as it may, and all of them called of late.
        """
        record = EnvRecord(env_id=-1, name="", config=config, registered_at=time.time(), owner=owner)
        env_id = await self._view.scripts.register_env(
            keys=[self._view.keys.envs, self._view.keys.heard, self._view.keys.once(nonce)],
            args=[
                *(REGISTRATION_ONCE_S, config.desired_name, msgspec.json.encode(record), MOST_ENVS),
                *(int(FORGOTTEN_S * 1000), int(CROWDED_S * 1000)),
            ],
        )
        if int(env_id) < 0:
            raise LimitReached(
                f"run {self._view.keys.run!r} has {MOST_ENVS} environments, and all of them called within {CROWDED_S:.0f} s: "
                "try again later, or use another run"
            )
        self._heard.pop(int(env_id), None)
        found = await self.env(int(env_id))
        if found is None:
            raise LookupError(f"environment {env_id} vanished while it registered: the run was reset")
        return found

    async def env(self, env_id: int) -> EnvRecord | None:
        async with self._view.redis.pipeline(transaction=False) as pipe:
            pipe.hget(self._view.keys.envs, str(env_id))
            pipe.zscore(self._view.keys.heard, str(env_id))
            return read_env(*await pipe.execute())

    async def envs(self) -> list[EnvRecord]:
        """All environments ever registered, by id; judge them by `is_alive`. For people: it takes as long as there were many."""
        raw: Mapping[bytes, bytes] = await self._view.redis.hgetall(self._view.keys.envs)
        heard = dict(await self._view.redis.zrange(self._view.keys.heard, 0, -1, withscores=True))
        found = [read_env(value, heard.get(key)) for key, value in raw.items() if key.isdigit()]
        return sorted((env for env in found if env), key=lambda env: env.env_id)

    async def touch_env(self, env_id: int, by: TokenRecord | None = None) -> EnvRecord | None:
        """An environment called: note when, and say who it is, as of a few seconds ago; None if it is not registered.

        `by`: the token that calls for it. Nothing is noted where it is another's.
        """
        now = time.monotonic()
        noted, known = self._heard.get(env_id, (-HEARD_EVERY_S, None))
        if known and now - noted < HEARD_EVERY_S:
            return known
        try:
            with patience(0):
                name = "" if by is None or by.role == "admin" else by.name
                raw = await self._view.scripts.touch_env(
                    keys=[self._view.keys.envs, self._view.keys.heard], args=[env_id, name]
                )
        except RedisError as error:
            if trouble(error) is None:
                raise
            return await self.env(env_id)  # it calls again soon, and is noted then
        if (found := read_json(EnvRecord, raw)) is not None and may_act_for(by, found):
            if len(self._heard) >= MOST_HEARD:
                self._heard.clear()
            self._heard[env_id] = now, structs.replace(found, heard_at=time.time())
        return found

    async def update_env(self, record: EnvRecord) -> None:
        args = [record.env_id, msgspec.json.encode(structs.replace(record, heard_at=0.0)), CHANGES]
        await self._view.scripts.update_env(keys=[self._view.keys.envs], args=args)

    def forget_envs(self) -> None:
        """The run was reset: ids are given out anew."""
        self._heard.clear()

    # -- inference servers ----------------------------------------------------------------------------------------

    async def report(self, status: ServerStatus) -> None:
        """Heartbeat of an inference server. Raises ConfigurationError for a name that nobody could be shown."""
        check_printable("server", status.server)
        status = structs.replace(status, last_error=status.last_error[:TEXT_BYTES])
        args = [status.server, msgspec.json.encode(status), status.version, int(REPLACED_VERSION_S * 1000)]
        await self._view.scripts.server_heartbeat(
            keys=[self._view.keys.pools, self._view.keys.served], args=args, client=self._view.heartbeats
        )

    async def withdraw(self, server: str) -> None:
        await self._view.redis.hdel(self._view.keys.pools, server)

    async def servers(self, pool: str | None = None) -> list[ServerStatus]:
        """All inference servers ever heard of and not withdrawn; judge them by `heartbeat`."""
        raw = await self._view.redis.hvals(self._view.keys.pools)
        found = [read_json(ServerStatus, value) for value in raw]
        return [status for status in found if status and (pool is None or status.pool == pool)]

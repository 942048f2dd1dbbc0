"""Registrations, of the trainer and of environments, and what they are told about the run."""

from __future__ import annotations

import uuid

import msgspec
from msgspec import Struct, structs
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lachesis.broker import Broker, Conflict
from lachesis.broker.records.entries import read_json
from lachesis.broker.records.registrations import EnvConfig, TrainerConfig
from lachesis.broker.run.registry import NAME_CHARACTERS, PRINTABLE
from lachesis.shim.batch.http_trainers import HttpTrainers, consumer_of
from lachesis.shim.errors import Malformed, detail
from lachesis.shim.http.access import caller_of, check_owner
from lachesis.shim.http.answers import (
    Disconnected,
    EnvRegistered,
    EnvWaits,
    Info,
    NotDisconnected,
    Registered,
    WandbInfo,
    answer,
)
from lachesis.shim.http.body import read_body
from lachesis.shim.intake.json_bodies import decode
from lachesis.shim.routes.status import EnvIdentifier, current_step

MAX_BATCH_SIZE = 1 << 20  # sequences of one step: choosing a batch takes this many bits
ATTEMPTS = 20  # to register while others do
MAX_TEXT_BYTES = 1024
MAX_NUMBER = 2**53  # what JSON numbers hold exactly; products and sums of these are finite


class RegistrationRoutes:
    """`/register`, `/register-env`, `/disconnect-env`, `/info`, `/wandb_info`, `/reset_data`."""

    def __init__(self, broker: Broker, trainers: HttpTrainers, max_body_bytes: int, max_runs: int = 0) -> None:
        self._broker, self._trainers, self._max_body_bytes = broker, trainers, max_body_bytes
        self._max_runs = max_runs

    async def register(self, request: Request) -> Response:
        config = decode(TrainerConfig, await read_body(request, self._max_body_bytes))
        _check_sizes(config)
        if not 1 <= config.batch_size <= MAX_BATCH_SIZE:
            rule = f"must be between 1 and {MAX_BATCH_SIZE} sequences"
            raise Malformed([detail("value_error", ["batch_size"], config.batch_size, rule)])
        _check_texts(config)
        consumer = consumer_of(request)
        await self._broker.enlist(self._max_runs)
        await self._adopt(config)
        await self._trainers.refit()
        await self._trainers.saw(consumer)
        await self._broker.journal.control("register", consumer, msgspec.json.encode(config).decode())
        return answer(Registered(uuid.uuid4().int))

    async def _adopt(self, config: TrainerConfig) -> None:
        """Make this the run's registration, unless an active trainer has registered other settings."""
        registry = self._broker.registry
        for _ in range(ATTEMPTS):
            judged = await registry.registration()
            earlier = read_json(TrainerConfig, judged)
            if earlier == config:
                return
            differing = _differing(earlier, config) if earlier else "settings that can't be read" if judged else ""
            if differing and (who := await self._trainers.active()):
                raise Conflict(
                    f"this run is registered with {differing}, and {who}: register the same settings, use another run, "
                    "or stop that trainer and try again in a minute (GET /reset_data forgets it, and all queued groups)"
                )
            status = await self._broker.queue.status()
            offset = max(0, config.starting_step - status.delivered)
            if await registry.adopt(judged, config, step_offset=offset):
                return
        raise Conflict("other trainers register with this run at this moment: try again, or use another run")

    async def register_env(self, request: Request) -> Response:
        config = decode(EnvConfig, await read_body(request, self._max_body_bytes))
        _check_sizes(config)
        if not 0 <= (config.min_batch_allocation or 0) <= 1:
            rule = "must be null or between 0 and 1: a part of each batch"
            raise Malformed([detail("value_error", ["min_batch_allocation"], config.min_batch_allocation, rule)])
        if len(config.desired_name) > NAME_CHARACTERS or not config.desired_name.isprintable():
            raise Malformed([detail("value_error", ["desired_name"], config.desired_name, PRINTABLE)])
        registry = self._broker.registry
        trainer = await registry.trainer_config()
        if trainer is None or not await registry.started():
            return answer(EnvWaits("wait for trainer to start"))
        await self._broker.enlist(self._max_runs)  # its trainer may be a native one, which does not come by here
        caller = caller_of(request)
        record = await registry.register_env(config, nonce=uuid.uuid4().hex, owner=caller.name if caller else "")
        await self._broker.journal.control("register-env", record.name, msgspec.json.encode(record).decode())
        return answer(
            EnvRegistered(
                status="success",
                env_id=record.env_id,
                wandb_name=record.name,
                checkpoint_dir=trainer.checkpoint_dir,
                starting_step=await current_step(self._broker),
                checkpoint_interval=trainer.save_checkpoint_interval,
                num_steps=trainer.num_steps,
            )
        )

    async def disconnect_env(self, request: Request) -> Response:
        env_id = decode(EnvIdentifier, await read_body(request, self._max_body_bytes)).env_id
        record = await self._broker.registry.env(env_id)
        if record is None:
            return answer(NotDisconnected("failure", "list index out of range"))
        check_owner(caller_of(request), record)
        await self._broker.registry.update_env(structs.replace(record, connected=False))
        await self._broker.journal.control("disconnect-env", record.name)
        return answer(Disconnected("success"))

    async def info(self, _: Request) -> Response:
        config = await self._broker.registry.trainer_config()
        return answer(Info(config.batch_size, config.max_token_len) if config else Info(-1, -1))

    async def wandb_info(self, _: Request) -> Response:
        config = await self._broker.registry.trainer_config()
        return answer(WandbInfo(config.wandb_group, config.wandb_project) if config else WandbInfo(None, None))

    async def reset_data(self, request: Request) -> Response:
        if await self._broker.exists():
            await self._broker.reset()
            await self._broker.journal.control("reset", consumer_of(request))
        return PlainTextResponse("Reset successful")


def _differing(earlier: TrainerConfig, config: TrainerConfig) -> str:
    """The earlier values of what differs. `starting_step` does not count: it is where a trainer resumes, not what it is."""
    names = [name for name in config.__struct_fields__ if name != "starting_step"]
    changed = [name for name in names if getattr(earlier, name) != getattr(config, name)]
    return ", ".join(f"{name} = {getattr(earlier, name)!r} (not {getattr(config, name)!r})" for name in changed)


def _check_sizes(config: Struct) -> None:
    """Raise Malformed for a number that later answers to others could not be computed with."""
    for name in config.__struct_fields__:
        value = getattr(config, name)
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise Malformed([detail("value_error", [name], value, "must be between -2^53 and 2^53")])


def _check_texts(config: TrainerConfig) -> None:
    for name in config.__struct_fields__:
        value = getattr(config, name)
        if isinstance(value, str) and len(value.encode()) > MAX_TEXT_BYTES:
            raise Malformed([detail("value_error", [name], value, f"must not be longer than {MAX_TEXT_BYTES} bytes")])

"""The Lua scripts, a file each beside what calls it; every write that touches more than one key is one of them.

They validate first and mutate last, because Redis does not roll a script back; they are idempotent, because a client
may send one again; and those that free memory run even when Redis is full (`allow-oom`). What several of them need is
in store/includes/, in the place of a line `--- @include <name>`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, get_type_hints

from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError

from lachesis.broker.store.connection import Redis
from lachesis.broker.store.multiplexed import Command, MultiplexedConnection

FLOORS = ("store", "run", "weights", "retention", "queue", "replicas")
FILES = {
    path.name.removesuffix(".lua"): path
    for floor in FLOORS
    for path in (files("lachesis.broker") / floor).iterdir()
    if path.name.endswith(".lua")
}

INCLUDES = files("lachesis.broker") / "store" / "includes"
INCLUDE = re.compile(r"(?m)^--- @include (\w+)\n")

LOADS = 5


class Script(AsyncScript):
    """redis-py loads a script that the server does not have, and calls it again. A server that is killed in between, and
    started again, does not have it once more.
    """

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for _ in range(LOADS):
            try:
                return await super().__call__(*args, **kwargs)
            except NoScriptError:
                continue
        return await super().__call__(*args, **kwargs)


class MultiplexedScript:
    """The same over a shared connection."""

    def __init__(self, multiplexed: MultiplexedConnection, text: str) -> None:
        self._multiplexed, self.script = multiplexed, text
        # what only reads needs no right to write to its keys
        self._command = "EVALSHA_RO" if "no-writes" in text.partition("\n")[0] else "EVALSHA"
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, *, keys: Sequence[Any], args: Sequence[Any] = (), after: Command | None = None) -> Any:
        """`after` is a command that is sent along, to be executed just before."""
        call = (self._command, self.sha, len(keys), *keys, *args)
        commands = (call,) if after is None else (after, call)
        for _ in range(LOADS):
            try:
                return (await self._multiplexed.call(*commands))[-1]
            except NoScriptError:
                await self._multiplexed.call(("SCRIPT", "LOAD", self.script))
        return (await self._multiplexed.call(*commands))[-1]


def _expanded(text: str, included: set[str]) -> str:
    """The text with each include in its place, where it is named first."""

    def include(line: re.Match[str]) -> str:
        name = line[1]
        if name in included:
            return ""
        included.add(name)
        return _expanded((INCLUDES / f"{name}.lua").read_text(), included)

    return INCLUDE.sub(include, text)


class Scripts:
    """The scripts: `await scripts.lease(keys=…, args=…)`; what each posted group, generation and step needs, multiplexed."""

    read_arrival: MultiplexedScript
    put: MultiplexedScript
    lengths: Script
    record_lineage: MultiplexedScript
    keep_refused: Script
    form: Script
    drop: Script
    lease: MultiplexedScript
    mark_delivered: Script
    renew: Script
    commit: Script
    retire: Script
    requeue: Script
    refit: Script
    purge: Script
    subscribe: Script
    take_writer_lock: Script
    keep_writer_lock: Script
    replace_registration: Script
    advance_checkpoint: Script
    list_run: Script
    note_trainer_call: Script
    leave: Script
    register_env: Script
    update_env: Script
    touch_env: Script
    publish: Script
    server_heartbeat: Script
    set_pool_rule: Script
    take_update_slot: Script
    set_fields: Script
    set_fields_if_new: Script
    append_capped: Script
    reset: Script
    start_generation: Script
    join: Script
    replica_heartbeat: Script
    evict: Script
    rendezvous: Script
    mark_current: Script
    open_step: MultiplexedScript
    claim_groups: MultiplexedScript
    vote: MultiplexedScript
    close_step: Script

    def __init__(self, redis: Redis, multiplexed: MultiplexedConnection) -> None:
        kinds = get_type_hints(type(self))
        for name, path in FILES.items():
            text = _expanded(path.read_text(), set())
            is_multiplexed = kinds[name] is MultiplexedScript
            setattr(self, name, MultiplexedScript(multiplexed, text) if is_multiplexed else Script(redis, text))

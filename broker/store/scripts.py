"""The Lua scripts, a file each beside what calls it; every write that touches more than one key is one of them.

They validate first and mutate last, because Redis does not roll a script back; they are idempotent, because a client
may send one again; and those that free memory run even when Redis is full (`allow-oom`). What several of them need is
in store/includes/, in the place of a line `-- include <name>`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError

from lachesis.broker.store.connection import Redis
from lachesis.broker.store.multiplexed import Command, Wire

FLOORS = ("store", "run", "weights", "retention", "queue", "replicas")
FILES = {
    path.name.removesuffix(".lua"): path
    for floor in FLOORS
    for path in (files("lachesis.broker") / floor).iterdir()
    if path.name.endswith(".lua")
}

FREQUENT = (
    "arrive",
    "put",
    "record",
    "lease",
    "open",
    "claim",
    "vote",
)  # what each posted group, generation and step needs
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


class WireScript:
    """The same over a shared connection."""

    def __init__(self, wire: Wire, text: str) -> None:
        self._wire, self.script = wire, text
        # what only reads needs no right to write to its keys
        self._command = "EVALSHA_RO" if "no-writes" in text.partition("\n")[0] else "EVALSHA"
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, *, keys: Sequence[Any], args: Sequence[Any] = (), after: Command | None = None) -> Any:
        """`after` is a command that is sent along, to be executed just before."""
        call = (self._command, self.sha, len(keys), *keys, *args)
        commands = (call,) if after is None else (after, call)
        for _ in range(LOADS):
            try:
                return (await self._wire.call(*commands))[-1]
            except NoScriptError:
                await self._wire.call(("SCRIPT", "LOAD", self.script))
        return (await self._wire.call(*commands))[-1]


def _included(line: re.Match[str]) -> str:
    return (files("lachesis.broker") / "store" / "includes" / f"{line[1]}.lua").read_text()


class Scripts:
    """The scripts: `await scripts.lease(keys=…, args=…)`."""

    arrive: WireScript
    put: WireScript
    lengths: Script
    record: WireScript
    bury: Script
    form: Script
    drop: Script
    lease: WireScript
    deliver: Script
    renew: Script
    commit: Script
    retire: Script
    requeue: Script
    refit: Script
    purge: Script
    subscribe: Script
    acquire: Script
    hold: Script
    adopt: Script
    cover: Script
    enlist: Script
    visit: Script
    leave: Script
    register_env: Script
    update_env: Script
    hear: Script
    publish: Script
    report: Script
    steer: Script
    take_turn: Script
    note: Script
    note_new: Script
    append: Script
    reset: Script
    found: Script
    join: Script
    beat: Script
    evict: Script
    meet: Script
    heal: Script
    open: WireScript
    claim: WireScript
    vote: WireScript
    close: Script

    def __init__(self, redis: Redis, wire: Wire) -> None:
        for name, path in FILES.items():
            text = re.sub(r"(?m)^-- include (\w+)$", _included, path.read_text())
            setattr(self, name, WireScript(wire, text) if name in FREQUENT else Script(redis, text))

"""The Lua scripts, one file each in scripts/; every write that touches more than one key is one of them.

They validate first and mutate last, because Redis does not roll a script back; they are idempotent, because a client
may send one again; and those that free memory run even when Redis is full (`allow-oom`).
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError

from lachesis.broker.connection import Redis

NAMES = (
    "put", "bury", "form", "drop", "lease", "renew", "commit", "retire", "cover", "leave", "requeue", "purge", "subscribe",
    "acquire", "adopt", "register_env", "publish", "note", "append", "reset",
)  # fmt: skip


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


class Scripts:
    """The registered scripts of one connection: `await scripts.put(keys=…, args=…)`."""

    put: Script
    bury: Script
    form: Script
    drop: Script
    lease: Script
    renew: Script
    commit: Script
    retire: Script
    requeue: Script
    purge: Script
    subscribe: Script
    acquire: Script
    adopt: Script
    cover: Script
    leave: Script
    register_env: Script
    publish: Script
    note: Script
    append: Script
    reset: Script

    def __init__(self, redis: Redis) -> None:
        folder = files("lachesis.broker") / "scripts"
        for name in NAMES:
            setattr(self, name, Script(redis, (folder / f"{name}.lua").read_text()))

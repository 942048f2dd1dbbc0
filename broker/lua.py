"""The Lua scripts, one file each in scripts/; every write that touches more than one key is one of them.

They validate first and mutate last, because Redis does not roll a script back; they are idempotent, because a client
may send one again; and those that free memory run even when Redis is full (`allow-oom`).
"""

from __future__ import annotations

from importlib.resources import files

from redis.commands.core import AsyncScript

from lachesis.broker.connection import Redis

NAMES = ("put", "form", "lease", "commit", "retire", "register_env", "note", "reset")


class Scripts:
    """The registered scripts of one connection: `await scripts.put(keys=…, args=…)`."""

    put: AsyncScript
    form: AsyncScript
    lease: AsyncScript
    commit: AsyncScript
    retire: AsyncScript
    register_env: AsyncScript
    note: AsyncScript
    reset: AsyncScript

    def __init__(self, redis: Redis) -> None:
        folder = files("lachesis.broker") / "scripts"
        for name in NAMES:
            setattr(self, name, redis.register_script((folder / f"{name}.lua").read_text()))

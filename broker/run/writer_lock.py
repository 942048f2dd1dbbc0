"""The lock whose holder alone may commit and publish for a policy."""

from __future__ import annotations

from typing import Literal

from redis.asyncio.lock import Lock
from redis.exceptions import LockNotOwnedError

from lachesis.broker.records.keys import Keys
from lachesis.broker.store.connection import Redis
from lachesis.broker.store.scripts import Script, Scripts


class WriterLock(Lock):
    """redis-py's lock, safe where a reply is lost, and to be had while Redis is full.

    One that lapsed because Redis was away, or refused to keep it, is kept on if nobody has held it since.
    """

    def __init__(self, redis: Redis, scripts: Scripts, keys: Keys, policy: str, ttl_s: float) -> None:
        super().__init__(redis, keys.writer(policy), timeout=ttl_s, sleep=min(1.0, ttl_s / 5), thread_local=False)
        self._scripts, self._ttl_s, self._state, self._field = scripts, ttl_s, keys.state, f"taken:{policy}"

    async def do_acquire(self, token: str | bytes) -> bool:
        return await self._call(self._scripts.take_writer_lock, token, self._ttl_s)

    async def do_extend(self, additional_time: float, replace_ttl: bool) -> Literal[True]:
        if not replace_ttl:
            return await super().do_extend(additional_time, replace_ttl)
        if not await self._call(self._scripts.keep_writer_lock, self.local.token, additional_time):
            raise LockNotOwnedError("another process has taken it")
        return True

    async def _call(self, script: Script, token: str | bytes, seconds: float) -> bool:
        keys, args = [self.name, self._state], [token, int(seconds * 1000), self._field]
        return bool(await script(keys=keys, args=args, client=self.redis))

    async def do_release(self, expected_token: bytes) -> None:
        try:
            await super().do_release(expected_token)
        except LockNotOwnedError:  # sent twice, or come late: either way it is not ours any more
            return

"""The environments that take part now, known to a process without reading all that ever registered.

The sorted set `heard` holds when each environment called last, by Redis's clock. A look reads the part that is newer than
the look before, and what nobody has said anything of for ALIVE_S falls out. Of an environment that changed (it signed off)
the hash `envs` says which one it was. So a look costs as much as there were calls and changes since the last one, however
many environments there are or were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from msgspec import structs

from lachesis.broker.records.entries import read_json, read_number
from lachesis.broker.records.registrations import EnvRecord, TokenRecord
from lachesis.broker.run_view import RunView

ALIVE_S = 60.0  # an environment silent for longer counts for nothing; environments call ten times a second
SLICE = 1000  # records read at a time
CHANGES = 512  # that are remembered; who has not looked for half of them reads all of the living


class Alive:
    """Environments that have a share in weights and batches: connected ones that called within ALIVE_S."""

    def __init__(self, envs: Iterable[EnvRecord] = ()) -> None:
        self._shares: dict[int, float] = {}
        self._minimums: dict[int, float] = {}
        self._sums: _Sums | None = None
        for env in envs:
            self.add(env)

    @property
    def total(self) -> float:
        """Of all shares."""
        return self._summed().total

    @property
    def minimums(self) -> dict[str, float]:
        """Of a batch, in the order of ids; without those that have none."""
        return self._summed().minimums

    @property
    def allocated(self) -> float:
        """Of all minimums."""
        return self._summed().allocated

    def add(self, env: EnvRecord) -> None:
        self._sums = None
        self._shares[env.env_id] = share(env)
        if env.config.min_batch_allocation:
            self._minimums[env.env_id] = env.config.min_batch_allocation

    def drop(self, env_id: int) -> None:
        self._sums = None
        self._shares.pop(env_id, None)
        self._minimums.pop(env_id, None)

    def _summed(self) -> _Sums:
        """In the order of ids: sums are the same whoever came back when."""
        if self._sums is None:
            self._shares, self._minimums = dict(sorted(self._shares.items())), dict(sorted(self._minimums.items()))
            minimums = {str(env_id): minimum for env_id, minimum in self._minimums.items()}
            self._sums = _Sums(sum(self._shares.values()), minimums, sum(minimums.values()))
        return self._sums


class _Sums(NamedTuple):
    total: float
    minimums: dict[str, float]
    allocated: float


def share(env: EnvRecord) -> float:
    """What an environment's weight counts, before it is divided by everybody's."""
    return env.config.max_token_length * max(0.0, env.config.weight)


def is_alive(env: EnvRecord, now: float) -> bool:
    """Whether the environment has a share in weights and batches: it is connected, and called within ALIVE_S."""
    return env.connected and now - env.heard_at < ALIVE_S


def may_act_for(caller: TokenRecord | None, env: EnvRecord) -> bool:
    """Whether who came with that token, or with none to an open run, may act for the environment."""
    return caller is None or caller.role == "admin" or env.owner in ("", caller.name)


class Environments:
    """Of one run. `ask` and `take` are one look, beside what else the caller's pipeline reads."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self.alive = Alive()
        self._heard: dict[
            int, float
        ] = {}  # milliseconds; the longest silent one first, of all that called within ALIVE_S
        self._changes: Any = None
        self._until = float("inf")  # before the first look, which reads all of the living

    def ask(self, pipe: Any) -> None:
        """Queue three commands; their replies are for `take`."""
        pipe.time()
        pipe.hmget(self._view.keys.envs, ["life", "changes"])
        pipe.zrange(self._view.keys.heard, self._until, "+inf", byscore=True, withscores=True)

    async def take(self, replies: Sequence[Any]) -> Alive:
        """The living, as of now."""
        (seconds, microseconds), changes, called = replies
        first = seconds * 1000 + microseconds / 1000 - 1000 * ALIVE_S
        changed = await self._changed(changes) if changes != self._changes else []
        self._changes = changes
        if changed is None:
            called = await self._view.redis.zrange(self._view.keys.heard, first, "+inf", byscore=True, withscores=True)
            self.alive, self._heard, self._until = Alive(), {}, first
        elif changed:
            records = await self._records(changed)
            for id_ in set(changed):
                self.alive.drop(id_)
                if id_ in self._heard and (record := records.get(id_)) and record.connected:
                    self.alive.add(record)
        new = [int(id_) for id_, at in called if at > first and int(id_) not in self._heard]
        records = await self._records(new)
        for id_, at in called:
            if at > first and int(id_) not in self._heard and (record := records.get(int(id_))) and record.connected:
                self.alive.add(record)
            self._heard[int(id_)] = max(at, self._heard.pop(int(id_), 0.0))
            self._until = max(self._until, at)
        while self._heard and self._heard[oldest := next(iter(self._heard))] <= first:
            del self._heard[oldest]
            self.alive.drop(oldest)
        return self.alive

    async def look(self) -> Alive:
        async with self._view.redis.pipeline(transaction=False) as pipe:
            self.ask(pipe)
            return await self.take(await pipe.execute())

    async def _changed(self, changes: Sequence[bytes | None]) -> list[int] | None:
        """Who changed since the look before; None where that is not known, and all of the living have to be read."""
        if self._changes is None or changes[0] != self._changes[0]:
            return None
        before, now = read_number(self._changes[1]), read_number(changes[1])
        if not 0 < now - before <= CHANGES // 2:
            return None
        raw = await self._view.redis.hmget(
            self._view.keys.envs, [f"change:{n % CHANGES}" for n in range(before + 1, now + 1)]
        )
        return None if None in raw else [read_number(id_) for id_ in raw]

    async def _records(self, ids: Sequence[int]) -> dict[int, EnvRecord]:
        found: dict[int, EnvRecord] = {}
        for start in range(0, len(ids), SLICE):
            part = ids[start : start + SLICE]
            raw = await self._view.redis.hmget(self._view.keys.envs, list(map(str, part)))
            found |= {
                id_: record for id_, text in zip(part, raw, strict=True) if (record := read_json(EnvRecord, text))
            }
        return found


def read_env(record: bytes | None, heard: float | None) -> EnvRecord | None:
    """An environment as it is kept, and when it was heard of last (milliseconds)."""
    env = read_json(EnvRecord, record)
    return env and structs.replace(env, heard_at=heard / 1000 if heard else env.registered_at)

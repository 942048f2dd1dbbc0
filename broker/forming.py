"""FORM: the next batch, from the counters, then the oldest part of the queue that it takes, then one script."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from lachesis.broker import allot
from lachesis.broker.codec import to_entry
from lachesis.broker.connection import Redis
from lachesis.broker.keys import Keys
from lachesis.broker.lua import Scripts
from lachesis.broker.parties import is_alive, read_envs
from lachesis.broker.records import BatchEntry, QueueStatus
from lachesis.broker.staleness import Staleness

PATIENCE_S = 30.0  # a batch waits this long for a living environment with a minimum that has nothing queued
MAX_SLICE = 1024  # entries read at a time

Entry = tuple[bytes, Mapping[bytes, bytes]]  # a queued group's id and fields, as Redis replies them


class Forming:
    """Forms batches of one run, together with every other replica that does."""

    def __init__(self, redis: Redis, scripts: Scripts, keys: Keys, staleness: Staleness) -> None:
        self._redis, self._scripts, self._keys, self._staleness = redis, scripts, keys, staleness

    async def form(self, batch_size: int) -> int | None:
        """Form the next batch; its step, or None if the queue can't make one yet.

        Groups that are too stale are not put into it, but dropped.
        Where it can't, the counters say so in constant time; where it can, about as many groups are read as are taken.
        """
        while True:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hgetall(self._keys.state)
                pipe.hgetall(self._keys.envs)
                state, envs = await pipe.execute()
            status, now = read_status(state), time.time()
            alive = [env for env in read_envs(envs) if is_alive(env, now)]
            minimums = allot.minimums(
                {str(env.env_id): env.config.min_batch_allocation or 0.0 for env in alive}, batch_size
            )
            attainable = allot.attainable(status.waiting, minimums, batch_size)
            if attainable is None or await self._is_worth_waiting(minimums, status, state, now):
                return None
            chosen = await self._choose(status, batch_size, attainable)
            if chosen and await self._staleness.drop([(id_, int(fields[b"v_min"])) for id_, fields in chosen]):
                continue
            if chosen:
                reply = await self._commit(status.formed + 1, batch_size, chosen)
                if reply != b"conflict":
                    return None if reply == b"held" else status.formed + 1
            if not chosen and int(await self._redis.hget(self._keys.state, "formed") or 0) == status.formed:
                return None  # nobody was faster: the run was reset meanwhile

    async def _is_worth_waiting(
        self, minimums: Mapping[str, int], status: QueueStatus, state: Mapping[bytes, bytes], now: float
    ) -> bool:
        """Whether to wait for an environment with a minimum that has nothing queued. FORM unmarks it when it has."""
        absent = {env: state.get(f"missing:{env}".encode()) for env in minimums if env not in status.waiting}
        if new := [f"missing:{env}" for env, since in absent.items() if since is None]:
            marks = [
                text for field in new for text in (field, str(now))
            ]  # not rounded: a mark in the future counts as none
            await self._scripts.note(keys=[self._keys.state], args=marks)
        return any(since is None or 0 <= now - float(since) < PATIENCE_S for since in absent.values())

    async def _choose(self, status: QueueStatus, batch_size: int, minimums: Mapping[str, int]) -> list[Entry] | None:
        """The groups of the batch, from the oldest part of the queue that has one; None if another replica took them."""
        counts = [item for sizes in status.waiting.values() for item in sizes.items()]
        groups, sequences = sum(count for _, count in counts), sum(size * count for size, count in counts)
        wanted = batch_size * groups // sequences + 8  # what a batch takes on average, and some more; then ever twice
        found: list[Entry] = []
        sizes: list[int] = []
        envs: list[str] = []
        while True:
            after = b"(" + found[-1][0] if found else b"-"
            count = min(wanted - len(found), MAX_SLICE)
            slice_ = await self._redis.xrange(self._keys.groups, after, count=count)
            found += slice_
            sizes += [int(fields[b"n"]) for _, fields in slice_]
            envs += [fields[b"env"].decode() for _, fields in slice_]
            at_end = len(slice_) < count
            if len(found) < wanted and not at_end:
                continue
            chosen = allot.next_batch(sizes, envs, batch_size, minimums, status.waiting, status.formed + 1)
            if chosen is not None:
                return [found[index] for index in chosen]
            if at_end:
                return None
            wanted *= 2

    async def _commit(self, step: int, batch_size: int, chosen: Sequence[Entry]) -> bytes:
        batch = BatchEntry(
            step=step,
            gids=tuple(fields[b"gid"].decode() for _, fields in chosen),
            n=batch_size,
            tok=sum(int(fields[b"tok"]) for _, fields in chosen),
            v_min=min(int(fields[b"v_min"]) for _, fields in chosen),
            v_max=max(int(fields[b"v_max"]) for _, fields in chosen),
            formed_at=time.time(),
            bytes=sum(int(fields[b"bytes"]) for _, fields in chosen),
        )
        ids = [id_ for id_, _ in chosen]
        return bytes(
            await self._scripts.form(
                keys=[self._keys.groups, self._keys.batches, self._keys.state, self._keys.settings],
                args=[step, batch_size, len(ids), *ids, *(text for pair in to_entry(batch).items() for text in pair)],
            )
        )


def read_status(state: Mapping[bytes, bytes]) -> QueueStatus:
    """The counters of the hash `state`. Formed but undelivered batches count as queued."""
    waiting: dict[str, dict[int, int]] = {}
    for field, count in state.items():
        if field.startswith(b"waiting:"):
            _, env, size = field.decode().split(":")
            waiting.setdefault(env, {})[int(size)] = int(count)

    def counter(name: bytes) -> int:
        return int(state.get(name, 0))

    return QueueStatus(
        groups=counter(b"groups") + counter(b"undelivered_groups"),
        sequences=counter(b"sequences") + counter(b"undelivered_sequences"),
        bytes=counter(b"bytes"),
        accepted=counter(b"accepted"),
        formed=counter(b"formed"),
        delivered=counter(b"delivered"),
        waiting=waiting,
        dead=counter(b"dead"),
        purged=counter(b"purged"),
        untrainable=counter(b"untrainable"),
        dropped=_counters(state, b"dropped:"),
        duplicates=_counters(state, b"duplicates:"),
    )


def _counters(state: Mapping[bytes, bytes], prefix: bytes) -> dict[str, int]:
    return {name.removeprefix(prefix).decode(): int(count) for name, count in state.items() if name.startswith(prefix)}

"""FORM: the next batch, from the counters, then the oldest part of the queue that it takes, then one script."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from lachesis.broker.errors import Unreadable
from lachesis.broker.queue import selection
from lachesis.broker.queue.counters import read_status
from lachesis.broker.queue.refit import Refit, fitted_to, sizes_of
from lachesis.broker.records.entries import flat_entry, read_number
from lachesis.broker.records.steps import BatchEntry, QueueStatus
from lachesis.broker.run.environments import Environments
from lachesis.broker.run_view import RunView

MINIMUM_WAIT_S = 30.0  # a batch waits this long for a living environment with a minimum that has nothing queued
MAX_SLICE = 1024  # entries read at a time
ATTEMPTS = 100  # while other replicas are faster

_COUNTS = (b"tok", b"v_min", b"v_max", b"bytes")  # of a queued group


Reply = Literal["formed", "conflict", "held"]
Entry = tuple[bytes, Mapping[bytes, bytes]]  # a queued group's id and fields, as Redis replies them


class BatchFormer:
    """Forms batches of one run, together with every other replica that does."""

    def __init__(self, view: RunView, staleness: Staleness, refit: Refit) -> None:
        self._view = view
        self._staleness, self._refit = staleness, refit
        self._environments = Environments(view)

    async def form(self, batch_size: int, policy: str = "main") -> int | None:
        """Form the next batch; its step, or None if the queue can't make one yet.

        Groups that are too stale are not put into it, but dropped; those too large for it are moved out of the queue.
        Where other settings were registered, all is first made to fit them (see refit.py), on behalf of `policy`.
        Where it can't, the counters say so in constant time; where it can, about as many groups are read as are taken.
        Counters that contradict the queue are made anew.
        """
        refitted, conflicts = False, 0
        while conflicts < ATTEMPTS:
            async with self._view.redis.pipeline(transaction=False) as pipe:
                pipe.hgetall(self._view.keys.state)
                pipe.hget(self._view.keys.trainers, "config")
                self._environments.ask(pipe)
                state, registered, *called = await pipe.execute()
            status, now, sizes = read_status(state), time.time(), sizes_of(registered)
            if sizes and not refitted and (str(sizes) != fitted_to(state) or _any_larger(status, sizes.batch_size)):
                await self._refit(policy)
                refitted = True
                continue
            alive = await self._environments.take(called)
            minimums = selection.minimums(alive.minimums, batch_size)
            attainable = selection.attainable(status.waiting, minimums, batch_size)
            if attainable is None or await self._is_worth_waiting(minimums, status, state, now):
                return None
            try:
                chosen = await self._choose(status, batch_size, attainable)
            except Unreadable:
                chosen = None
            if chosen and sizes and not refitted and _any_longer(chosen, sizes.max_token_len):
                await self._refit(policy)
                refitted = True
                continue
            if chosen and await self._staleness.drop([(id_, int(fields[b"v_min"])) for id_, fields in chosen]):
                continue
            if chosen:
                reply = await self._write(status.formed + 1, batch_size, chosen)
                conflicts += 1
                if reply != "conflict":
                    return None if reply == "held" else status.formed + 1
            if not chosen and int(await self._view.redis.hget(self._view.keys.state, "formed") or 0) == status.formed:
                if refitted:
                    return None
                await self._refit(policy)  # nobody was faster: the counters are of groups that are not there
                refitted = True
        return None

    async def _is_worth_waiting(
        self, minimums: Mapping[str, int], status: QueueStatus, state: Mapping[bytes, bytes], now: float
    ) -> bool:
        """Whether to wait for an environment with a minimum that has nothing queued. FORM unmarks it when it has."""
        absent = {env: state.get(f"missing:{env}".encode()) for env in minimums if env not in status.waiting}
        if gone := [
            name for name in state if name.startswith(b"missing:") and name[8:].decode(errors="replace") not in minimums
        ]:
            await self._view.redis.hdel(self._view.keys.state, *gone)  # it has gone, and nobody waits for it any more
        if new := [f"missing:{env}" for env, since in absent.items() if since is None]:
            marks = [
                text for field in new for text in (field, str(now))
            ]  # not rounded: a mark in the future counts as none
            await self._view.scripts.set_fields(keys=[self._view.keys.state], args=marks)
        return any(since is None or 0 <= now - float(since) < MINIMUM_WAIT_S for since in absent.values())

    async def _choose(self, status: QueueStatus, batch_size: int, minimums: Mapping[str, int]) -> list[Entry] | None:
        """The groups of the batch, from the oldest part of the queue that has one; None if another replica took them.

        Raises Unreadable if an entry on the way is.
        """
        counts = [item for sizes in status.waiting.values() for item in sizes.items()]
        groups, sequences = sum(count for _, count in counts), sum(size * count for size, count in counts)
        wanted = batch_size * groups // sequences + 8  # what a batch takes on average, and some more; then ever twice
        found: list[Entry] = []
        sizes: list[int] = []
        envs: list[str] = []
        while True:
            after = b"(" + found[-1][0] if found else b"-"
            count = min(wanted - len(found), MAX_SLICE)
            slice_ = await self._view.redis.xrange(self._view.keys.groups, after, count=count)
            found += slice_
            try:
                sizes += [int(fields[b"n"]) for _, fields in slice_]
                envs += [fields[b"env"].decode() for _, fields in slice_]
            except (KeyError, ValueError) as error:
                raise Unreadable(f"an entry of the queue has no {error}") from error
            at_end = len(slice_) < count
            if len(found) < wanted and not at_end:
                continue
            chosen = selection.select_batch(sizes, envs, batch_size, minimums, status.waiting, status.formed + 1)
            if chosen is not None:
                taken = [found[index] for index in chosen]
                _check(taken)
                return taken
            if at_end:
                return None
            wanted *= 2

    async def _write(self, step: int, batch_size: int, chosen: Sequence[Entry]) -> Reply:
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
        return await _form(self._view, batch, [id_ for id_, _ in chosen])


async def _form(view: RunView, batch: BatchEntry, ids: Sequence[bytes]) -> Reply:
    """form.lua; `ids` are of the batch's groups in the queue."""
    keys = view.keys
    reply = await view.scripts.form(
        keys=[keys.groups, keys.batches, keys.state, keys.settings],
        args=[batch.step, batch.n, len(ids), *ids, *flat_entry(batch)],
    )
    return cast("Reply", reply.decode())


def _any_larger(status: QueueStatus, batch_size: int) -> bool:
    """Whether a queued group has more sequences than a batch, posted while other settings were registered."""
    return any(size > batch_size for sizes in status.waiting.values() for size in sizes)


def _check(chosen: Sequence[Entry]) -> None:
    """Raise Unreadable unless all that is asked of them below can be read."""
    try:
        for _, fields in chosen:
            fields[b"gid"].decode()
            for name in _COUNTS:
                int(fields[name])
    except (KeyError, ValueError) as error:
        raise Unreadable(f"an entry of the queue has no {error}") from error


def _any_longer(chosen: Sequence[Entry], max_token_len: int) -> bool:
    return any(read_number(fields.get(b"longest", b"0")) > max_token_len for _, fields in chosen)


class Staleness:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def rule(self) -> tuple[int, int]:
        """(max_lag, newest version of the policy it is about); max_lag 0: groups of any age are trained."""
        max_lag, policy = await self._view.redis.hmget(self._view.keys.state, ["max_lag", "lag_of"])
        if not read_number(max_lag):
            return 0, 0
        newest = await self._view.redis.xrevrange(self._view.keys.weights(policy.decode()), count=1)
        return read_number(max_lag), int(newest[0][0].split(b"-")[0]) if newest else 0

    async def drop(self, queued: Sequence[tuple[bytes, int]]) -> int:
        """Make dead letters of the stale ones among queued groups, (entry id, v_min) each. Returns how many were stale."""
        max_lag, newest = await self.rule()
        stale = [id_ for id_, v_min in queued if 0 < max_lag < newest - v_min]
        if stale:
            keys = [self._view.keys.groups, self._view.keys.dead, self._view.keys.state]
            await self._view.scripts.drop(keys=keys, args=[newest, max_lag, *stale])
        return len(stale)

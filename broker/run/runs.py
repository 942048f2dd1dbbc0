"""Which runs a Redis has, and what becomes of one: it is put on the list, reset, forgotten."""

from __future__ import annotations

import time

from lachesis.broker.errors import LimitReached
from lachesis.broker.records.entries import read_seconds
from lachesis.broker.records.groups import AGAIN, LONGEST_WINDOW_S
from lachesis.broker.records.keys import RUNS
from lachesis.broker.run_view import RunView

SLICE = 1000
CLOCKS_S = 3600  # by which the clocks of trainers may differ
ENLISTED_S = 300.0  # a run that is on the list is not looked up again for so long
LOOKED_AT = 100_000  # keys, for the names of runs in an error's message


class Runs:
    """The runs of one Redis, as one of them sees them."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self._enlisted_at = float("-inf")

    async def enlist(self, most: int = 0) -> None:
        """Put the run on the list of runs; also when Redis is full, for the trainer that frees it.

        Raises LimitReached where `most` runs are on it (0: any number), and this one is new.
        """
        if time.monotonic() - self._enlisted_at < ENLISTED_S:
            return
        if not await self._view.scripts.list_run(keys=[RUNS], args=[self._view.keys.run, f"{time.time():.3f}", most]):
            if not await self.exists():
                raise LimitReached(
                    f"this Redis has {most} runs, and {self._view.keys.run!r} is none of them: use one that there is, or start the shim with a larger --max-runs"
                )
            return
        self._enlisted_at = time.monotonic()

    async def enlisted(self) -> dict[str, float]:
        """All enlisted runs of this Redis, oldest first, and when they came."""
        raw = await self._view.redis.hgetall(RUNS)
        found = {name.decode(errors="replace"): read_seconds(since) for name, since in raw.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    async def exists(self) -> bool:
        """Whether the run is enlisted, or anybody has left anything in it."""
        keys = self._view.keys
        if await self._view.redis.exists(
            keys.state, keys.batches, keys.settings
        ):  # which every user of Redis who asks may read
            return True
        left = (keys.trainers, keys.envs, keys.pools, keys.groups, keys.control, keys.metrics, keys.dead, keys.refused)
        more = (keys.tokens, keys.weights("main"), keys.writer("main"))
        return await self._view.redis.exists(*left, *more) > 0 or bool(await self._view.redis.hexists(RUNS, keys.run))

    async def known(self) -> list[str]:
        """The enlisted runs, and those that merely have keys, as far as a bounded look at the keys finds them."""
        names = set(await self.enlisted())
        looked = 0
        async for key in self._view.redis.scan_iter(match="lachesis:{*}:*", count=SLICE):
            names.add(key.decode(errors="replace").partition("{")[2].partition("}")[0])
            looked += 1
            if looked >= LOOKED_AT:
                break
        return sorted(names)

    async def forget(self) -> None:
        """Delete every key of the run, weights and logs included; its tokens stay, or it would be open to everyone."""
        pattern = self._view.keys.groups.removesuffix("groups") + "*"
        found = [key async for key in self._view.redis.scan_iter(match=pattern, count=SLICE)]
        found = [key for key in found if key != self._view.keys.tokens.encode()]
        for start in range(0, len(found), SLICE):
            await self._view.redis.unlink(*found[start : start + SLICE])
        await self._view.redis.hdel(RUNS, self._view.keys.run)
        self._enlisted_at = float("-inf")

    async def reset(self) -> None:
        """Forget the run's queue, batches, ledgers, dead letters and registrations; weights, logs, refused posts stay.

        What was posted before may be posted again; what is posted meanwhile is forgotten, or comes after. One script does it.
        """
        keys = self._view.keys
        prefix = keys.groups.removesuffix("groups")
        named = [keys.groups, keys.batches, keys.dead, keys.skipped, keys.trained, keys.state, keys.envs, keys.heard]
        named.append(keys.trainers)
        of_policy = (keys.ledger, keys.replicas, keys.members, keys.beats, keys.meeting, keys.work)
        marked_after = int((time.time() - LONGEST_WINDOW_S - CLOCKS_S) * 1000)
        names = [name("").removeprefix(prefix) for name in of_policy]
        await self._view.scripts.reset(keys=named, args=[prefix, AGAIN, marked_after, *names])

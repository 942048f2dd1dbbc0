"""What a pool of servers serves, and who of it may update now.

A pool's rule is the newest entry of its stream: serve the newest version, one pinned version, or another one on a share
of the servers first. Every server reads it with its own cursor and finds its own part of it, so nobody hands out parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from lachesis.broker.records.entries import read_entries, to_entry
from lachesis.broker.records.versions import PoolRule, WeightsEntry
from lachesis.broker.run_view import RunView
from lachesis.broker.store.connection import wait_for_any

KEEP_RULES = 1000  # entries, approximately
LOOK_BACK = 3  # entries, should the newest be unreadable
NONE = "0-0"  # id of the rule of a pool that was never given one

NEWEST = PoolRule("newest")


class Orders(NamedTuple):
    """What a server of a pool goes by: the rule, and the policy's newest version."""

    rule_id: str
    rule: PoolRule
    newest: WeightsEntry | None
    newest_id: str = NONE  # of the newest entry, which a version that can't be read may be behind


class Pools:
    """The `rule:<pool>` streams and `updating:<pool>` sets of one run."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    async def rule(self, pool: str) -> tuple[str, PoolRule]:
        """The pool's rule and its id, for `steer`."""
        found = await self._view.redis.xrevrange(self._view.keys.rule(pool), count=LOOK_BACK)
        return _rule(found)

    async def set_rule(self, pool: str, rule: PoolRule, judged: str) -> bool:
        """Make `rule` the pool's, if the rule of the id `judged` still is; False if another was made meanwhile."""
        fields = [text for pair in to_entry(rule).items() for text in pair]
        return bool(
            await self._view.scripts.set_pool_rule(
                keys=[self._view.keys.rule(pool)], args=[judged, KEEP_RULES, *fields]
            )
        )

    async def orders(self, pool: str, policy: str) -> Orders:
        """The pool's rule and the policy's newest version, as of one moment."""
        async with self._view.redis.pipeline(transaction=False) as pipeline:
            pipeline.xrevrange(self._view.keys.rule(pool), count=LOOK_BACK)
            pipeline.xrevrange(self._view.keys.weights(policy), count=LOOK_BACK)
            rules, versions = await pipeline.execute()
        readable = read_entries(WeightsEntry, versions)
        return Orders(
            *_rule(rules), readable[0][1] if readable else None, versions[0][0].decode() if versions else NONE
        )

    async def wait_for_orders(self, pool: str, policy: str, known: Orders, timeout_s: float) -> None:
        """Return as soon as there is a rule or a version newer than those known, or after `timeout_s`."""
        cursors = {self._view.keys.rule(pool): known.rule_id, self._view.keys.weights(policy): known.newest_id}
        await wait_for_any(self._view.blocking, cursors, timeout_s)

    async def take_turn(self, pool: str, server: str, at_once: int, ttl_s: float) -> bool:
        """Whether the server may update now; to be taken again before `ttl_s` are over."""
        args = [server, at_once, int(ttl_s * 1000)]
        return bool(await self._view.scripts.take_update_slot(keys=[self._view.keys.updating(pool)], args=args))

    async def end_turn(self, pool: str, server: str) -> None:
        await self._view.redis.zrem(self._view.keys.updating(pool), server)


def canaries(rule: PoolRule, servers: Iterable[str]) -> set[str]:
    """Which of a pool's servers serve the canary's version.

    The first of them in the order of a hash of their names, so that one who comes or goes changes at most one other's
    part. At least one, and at least one that does not; so none in a pool of one.
    """
    if rule.mode != "canary":
        return set()
    ordered = sorted(set(servers), key=lambda name: hashlib.sha256(name.encode()).digest())
    count = min(max(1, round(rule.share * len(ordered))), len(ordered) - 1)
    return set(ordered[: max(0, count)])


def _rule(found: list[tuple[bytes, dict[bytes, bytes]]]) -> tuple[str, PoolRule]:
    """The newest rule that can be read, and the id of the newest, by which STEER judges."""
    readable = read_entries(PoolRule, found)
    return found[0][0].decode() if found else NONE, readable[0][1] if readable else NEWEST

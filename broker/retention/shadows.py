"""Shadows: policies that train on the batches which another policy's trainer asks for.

A lossless shadow trains every batch: none is formed while it is `max_behind` behind. A lossy one holds nobody back: when it
is further behind it skips the oldest batches that it has not read, which the audit counts. What it has trained since its
last checkpoint is kept for it all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct
from redis.exceptions import ResponseError

from lachesis.broker.records.keys import ARCHIVE
from lachesis.broker.run_view import RunView
from lachesis.broker.store.redis_errors import trouble

Kind = Literal["lossless", "lossy"]
_RULE = re.compile(r"(lossless|lossy) (\d+)")


class Rule(Struct, frozen=True):
    """How a shadow reads. SUBSCRIBE keeps it, FORM, LEASE and RETIRE go by it."""

    kind: Kind
    max_behind: int  # batches formed that it has not trained, at least 1

    def __str__(self) -> str:
        return f"{self.kind} {self.max_behind}"


class Reading(Struct, frozen=True):
    """Where a policy is among a run's batches."""

    policy: str
    rule: Rule | None  # None: it is no shadow
    settled: int  # newest step up to which it has trained or skipped all
    behind: int  # batches formed after that
    committed: int  # steps it trained
    skipped: int  # steps it did not: skipped, or given up after too many attempts
    holds: bool  # whether no batch is formed because of it


class Shadows:
    """Of one run."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    async def rules(self) -> dict[str, Rule]:
        """Each shadow's."""
        found: Mapping[bytes, bytes] = await self._view.redis.hgetall(self._view.keys.settings)
        rules = {}
        for field, value in found.items():
            if field.startswith(b"shadow:") and (rule := _RULE.fullmatch(value.decode(errors="replace"))):
                kind: Kind = "lossy" if rule[1] == "lossy" else "lossless"
                rules[field.decode().removeprefix("shadow:")] = Rule(kind, int(rule[2]))
        return rules

    async def readings(self) -> list[Reading]:
        """Of all policies that read batches, shadows last."""
        try:
            readers = await self._view.redis.xinfo_groups(self._view.keys.batches)
        except ResponseError as error:  # nobody ever subscribed
            if trouble(error):
                raise
            return []
        rules = await self.rules()
        state: Mapping[bytes, bytes] = await self._view.redis.hgetall(self._view.keys.state)
        skipped = [field.decode().rpartition(":")[0] for field in await self._view.redis.hkeys(self._view.keys.skipped)]
        formed = int(state.get(b"formed", 0))
        found = []
        for reader in readers:
            policy = reader["name"].decode()
            if policy == ARCHIVE:
                continue
            # what was freed before a late one joined is not there to be waited for
            unread = await self._view.redis.xrange(
                self._view.keys.batches, f"({reader['last-delivered-id'].decode()}", count=1
            )
            oldest = unread[0][0] if unread else b"%d-0" % (formed + 1)
            if (
                reader["pending"]
                and (pending := await self._view.redis.xpending(self._view.keys.batches, policy))["pending"]
            ):
                oldest = pending["min"]
            settled = int(oldest.split(b"-")[0]) - 1
            rule, behind = rules.get(policy), max(0, formed - settled)
            found.append(
                Reading(
                    policy=policy,
                    rule=rule,
                    settled=settled,
                    behind=behind,
                    committed=int(state.get(f"committed:{policy}".encode(), 0)),
                    skipped=skipped.count(policy),
                    holds=rule is not None and rule.kind == "lossless" and behind >= rule.max_behind,
                )
            )
        return sorted(found, key=lambda reading: (reading.rule is not None, reading.policy))

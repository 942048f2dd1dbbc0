"""Whether the queue has room for a group, by its counters: as put.lua decides, without asking it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lachesis.broker.records.groups import Limits

WHY = {  # by what PUT replies
    "late": "a group that came now would be trained more than max_lag steps late",
    "full": "the queue is over its quota",
    "env_full": "the environment is over its quota of the queue",
}


@dataclass(frozen=True)
class Size:
    """What a group adds to the queue; of a post whose body is not read, nothing is known."""

    env: str | None = None
    sequences: int = 0
    bytes: int = 0


UNREAD = Size()


@dataclass
class Room:
    """What the queue holds, by its counters, and by what was admitted since they were read."""

    limits: Limits
    counters: Counter[str]
    batch_size: int  # of the registered trainer; 0: none, and nobody knows
    starves: bool = False  # no batch can be made of what is queued

    def refusal(self, size: Size) -> str:
        """Why PUT would not store a group of that size now; empty if it would. As in put.lua."""
        limits, waiting = self.limits, self.counters["sequences"] + self.counters["undelivered"] * self.batch_size
        if limits.max_lag and self.batch_size and waiting >= limits.max_lag * self.batch_size:
            return WHY["late"]
        if self._over("bytes", size.bytes, limits.bytes) or self._over("sequences", size.sequences, limits.sequences):
            return WHY["full"]
        if self._over(f"env_bytes:{size.env}", size.bytes, limits.env_bytes) or self._over(
            f"env_sequences:{size.env}", size.sequences, limits.env_sequences
        ):
            return WHY["env_full"]
        return ""

    def admit(self, size: Size) -> None:
        """Count a group that will be put; one that is not read as the average of what is queued."""
        groups = max(1, self.counters["groups"])
        sequences = size.sequences or -(-self.counters["sequences"] // groups)
        stored = size.bytes or -(-self.counters["bytes"] // groups)
        added = {"groups": 1, "sequences": sequences, "bytes": stored}
        self.counters.update({**added, f"env_sequences:{size.env}": sequences, f"env_bytes:{size.env}": stored})

    def _over(self, name: str, added: int, limit: int) -> bool:
        held = self.counters[name]
        return limit > 0 and held > 0 and held + max(1, added) > limit

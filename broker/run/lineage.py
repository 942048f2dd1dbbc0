"""From the front door to the shim: which versions produced a finished generation, and its sampled log-probs.

Keyed by a hash of the whole sequence (prompt and output ids), which is what an environment posts later. Bounded in
time and in bytes, whatever the number of front doors: record_lineage.lua says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from msgspec import structs

from lachesis.broker.records.entries import read_json
from lachesis.broker.records.groups import Lineage
from lachesis.broker.run_view import RunView

TTL_S = 7200  # a record is kept for between half of this and all of it
MAX_BYTES = 256 << 20


class Known(NamedTuple):
    """The reply of read_arrival.lua."""

    registration: bytes | None  # of the trainer, as it is kept
    newest: list[tuple[bytes, list[bytes]]]  # entry of the policy's newest version, if there is one
    servers: list[bytes]  # their heartbeats
    has_lineages: int  # 0 where nobody recorded any
    lineages: list[bytes | None]  # one per digest
    oldest_served: int  # of the versions served of late; -1 for none


class LineageStore:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def record(self, lineages: Sequence[tuple[str, Lineage]], *, max_bytes: int = MAX_BYTES) -> int:
        """Remember (digest, lineage) pairs for an hour or two, or until others need the bytes; repeating is harmless.

        Returns how many older ones had to go before their time.
        """
        args: list[str | bytes | int] = [max_bytes, TTL_S]
        for digest, lineage in lineages:
            args += (digest, to_record(lineage))
        return int(
            await self._view.scripts.record_lineage(
                keys=[self._view.keys.lineage, self._view.keys.old_lineage], args=args
            )
        )

    async def look_up(self, digests: Sequence[str]) -> list[Lineage | None]:
        known = await self.read_arrival("main", digests)
        return [from_record(raw) if raw else None for raw in known.lineages]

    async def read_arrival(self, policy: str, digests: Sequence[str]) -> Known:
        """What the run knows when a group arrives whose sequences' generations may end at these digests, in one trip."""
        keys = self._view.keys
        reply = await self._view.scripts.read_arrival(
            keys=[keys.trainers, keys.weights(policy), keys.pools, keys.lineage, keys.old_lineage, keys.served],
            args=digests,
        )
        return Known(*reply)


def to_record(lineage: Lineage) -> bytes:
    """JSON, for people to read, and behind a line break the log-probs as they are."""
    if not lineage.log_probs:
        return msgspec.json.encode(lineage)
    return b"\n".join((msgspec.json.encode(structs.replace(lineage, log_probs=b"")), lineage.log_probs))


def from_record(raw: bytes) -> Lineage | None:
    """None where it can't be read: then it is not known which versions made the generation."""
    head, _, log_probs = raw.partition(b"\n")
    lineage = read_json(Lineage, head)
    return structs.replace(lineage, log_probs=log_probs) if lineage and log_probs else lineage

"""Which weight versions made a posted group: Atropos environments do not say, so it is joined or bounded here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from msgspec import structs

from lachesis.broker import Broker
from lachesis.broker.queue.put import Believed
from lachesis.broker.records.entries import read_json
from lachesis.broker.records.groups import Group
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.run.lineage import from_record
from lachesis.shim.intake.lineage_match import UNKNOWN, Joined, Places, covers, digests, join, mismatched, places

FRESH_S = 1.0
HEARTBEAT_S = 60.0  # a server not heard of for longer serves nobody


class Arrival(NamedTuple):
    """What the run knew when a group arrived."""

    trainer: TrainerConfig | None
    newest: int  # version of the policy
    servers: list[bytes]  # ServerStatus each, JSON
    oldest: int  # version that a server served of late; -1: none did
    places: list[Places]  # per sequence: where generations may end; none where nobody serves this run's weights
    lineages: list[bytes | None]  # of all those ends, in order
    believed: Believed | None = None  # set where Redis was not asked anew


class Annotated(NamedTuple):
    """A group with what is known of the making of its tokens, and what that adds to `Versions.counts` once it is stored."""

    group: Group
    counts: dict[str, int]


class Versions:
    """Version spans of groups: what the environment says, else the front door's lineage, else bounds.

    `counts`, of sequences: `sent` by the environment; `joined` with lineage to the last trained token; `unknown`, if
    only in part; and `mismatched`, those among the joined whose posted log-probs are not the sampler's.
    """

    def __init__(self, broker: Broker, policy: str) -> None:
        self.counts: Counter[str] = Counter(joined=0, unknown=0, mismatched=0, sent=0)
        self._broker, self._policy = broker, policy
        self._last: tuple[float, Arrival] | None = None  # while nobody serves: when, and what Redis said

    async def arrival(self, group: Group, *, ask: bool = False) -> Arrival:
        """What Redis says of a group and of the run, in one trip. The group need not be valid yet.

        While nobody serves the run's weights, as with servers of the user's own, the same holds for the next group, too:
        it is believed for FRESH_S, and PUT tells if it is not so any more. Then `ask` again. The trip is a tenth of the CPU
        that a post of 8 x 2048 tokens in JSON takes, here and in Redis, and a sixth or more where it is packed or short.
        """
        if group.versions is None and self._last and not ask and time.monotonic() - self._last[0] < FRESH_S:
            return self._last[1]
        found = places(group)
        config, newest, servers, recorded, lineages, oldest = await self._broker.lineage.read_arrival(
            self._policy, digests(group, found) if group.versions is None else ()
        )
        trainer = read_json(TrainerConfig, config)
        arrival = Arrival(
            trainer, int(newest[0][0].partition(b"-")[0]) if newest else 0, servers, oldest, found, lineages
        )
        believed = Believed(self._policy, config or b"", newest[0][0] if newest else b"")
        self._last = None
        if not servers and not recorded and oldest < 0:
            self._last = time.monotonic(), arrival._replace(places=[], lineages=[], believed=believed)
        return arrival

    async def newest(self) -> int:
        """The policy's newest version; 0, the base weights, before the first is published."""
        found = await self._broker.weights.newest(self._policy)
        return found.version if found else 0


def annotate(arrival: Arrival, group: Group) -> Annotated:
    """A valid group with its versions, and with the sampler's log-probs where it has none of its own.

    v_min and v_max are exact where the making of every trained token is known. Else bounds are counted in: newest is the
    policy's newest version, oldest what the slowest server served of late, as Redis remembers it for all shims.
    """
    joined = _joined(arrival, group)
    versions = [version for each in joined for version, _, _ in each.spans]
    if not versions or not all(each.whole for each in joined):
        versions += _bounds(arrival)
    annotated = structs.replace(
        group,
        v_min=min(versions),
        v_max=max(versions),
        versions=[each.spans for each in joined] if any(each.spans for each in joined) else group.versions,
        sampled_logprobs=_sampled(group, joined),
    )
    return Annotated(annotated, _count(group, joined))


def _joined(arrival: Arrival, group: Group) -> list[Joined]:
    """What is known of each sequence: what was posted of it, else what the front door recorded."""
    if group.versions is not None:
        return [
            Joined(spans, covers(spans, place, len(row)), None)
            for row, place, spans in zip(group.tokens, arrival.places, group.versions, strict=True)
        ]
    if arrival.believed:
        return [Joined((), False, None)] * len(group.tokens)
    lineages = (from_record(raw) if raw else None for raw in arrival.lineages)
    return [
        join(len(row), place, list(islice(lineages, len(place.ends))))
        for row, place in zip(group.tokens, arrival.places, strict=True)
    ]


def _count(group: Group, joined: Sequence[Joined]) -> dict[str, int]:
    if group.versions is not None:
        return {"sent": len(joined)}
    whole = sum(each.whole for each in joined)
    differing = mismatched(group.inference_logprobs, joined) if group.inference_logprobs else 0
    return {"joined": whole, "unknown": len(joined) - whole, "mismatched": differing}


def _sampled(group: Group, joined: Sequence[Joined]) -> list[np.ndarray] | None:
    if group.inference_logprobs or all(each.log_probs is None for each in joined):
        return None
    return [
        np.full(len(row), UNKNOWN, "<f4") if each.log_probs is None else each.log_probs
        for row, each in zip(group.tokens, joined, strict=True)
    ]


def _bounds(arrival: Arrival) -> tuple[int, int]:
    now = time.time()
    statuses = (read_json(ServerStatus, raw) for raw in arrival.servers)  # also of agents that keep no `served`
    versions = [each.version for each in statuses if each and abs(now - each.heartbeat) < HEARTBEAT_S]
    oldest = min((version for version in (arrival.oldest, *versions) if version >= 0), default=arrival.newest)
    return min(oldest, arrival.newest), arrival.newest

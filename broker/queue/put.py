"""PUT: make a posted group part of the queue, once."""

from __future__ import annotations

import os
from itertools import count
from typing import NamedTuple

from msgspec import structs

from lachesis.broker.queue.admission import check_bounds, check_id
from lachesis.broker.queue.blobs import Blobs
from lachesis.broker.records.blobs import queue_entry, to_blob
from lachesis.broker.records.entries import flat_entry, id_number
from lachesis.broker.records.groups import DUPLICATE_WINDOW_S, Group, Limits, ScoredGroup
from lachesis.broker.records.packing import pack, to_arrays
from lachesis.broker.run_view import RunView

BLOB_TTL_S = 600  # a blob not yet in the queue expires after this

NO_LIMITS = Limits()


class Believed(NamedTuple):
    """What a caller of PUT holds true of the run without having asked again: this, and that nobody serves its weights."""

    policy: str
    registration: bytes  # of the trainer, as it is kept; empty for none
    newest: bytes  # entry id of the policy's newest version; empty for none


class Put:
    def __init__(self, view: RunView, blobs: Blobs) -> None:
        self._view, self._blobs = view, blobs
        self._caller, self._calls = os.urandom(6).hex(), count()

    async def __call__(
        self,
        gid: str,
        group: Group | ScoredGroup,
        *,
        v_min: int,
        v_max: int,
        limits: Limits = NO_LIMITS,
        packed: bytes = b"",
        believed: Believed | None = None,
        digest: str = "",
        window_s: int = DUPLICATE_WINDOW_S,
        account: str = "",
    ) -> str:
        """Store a valid group durably, once. Returns "stored"; or, and then nothing is stored, "duplicate"; or what it is
        over: "late" (max_lag), "full" (a quota of the queue), "env_full" (a quota of its environment); or "changed": what
        is `believed` of the run is not so.

        A group of the same `gid` is a duplicate for `window_s` after the first was accepted, and for as long as that one
        is neither trained nor given up. After that it is a group of its own, with another id where the first is still
        kept. Where the id is not made of the body, `digest` is: another body under a known id is a "conflict".

        Raises InvalidGroup for an id or versions that no group can have; the rest is for `admit` to see.

        `packed` is the group's packed form where the caller has it already: it is stored as it is. `account` is what the
        group is counted under, if that is not its environment's id.
        """
        if isinstance(group, ScoredGroup):
            group = to_arrays(group)
        check_id(gid)
        check_bounds(v_min, v_max)
        packed = packed or pack(group)
        names, post, call = self._view.keys, gid, f"{self._caller}{next(self._calls):x}"
        quotas = [limits.bytes, limits.sequences, limits.env_bytes, limits.env_sequences]
        lag = ["" if limits.max_lag is None else limits.max_lag, believed.policy if believed else limits.policy]
        belief = [1, believed.registration, believed.newest] if believed else [0, "", ""]
        while True:
            blob = to_blob(
                packed,
                gid,
                v_min=v_min,
                v_max=v_max,
                versions=group.versions,
                sampled_logprobs=group.sampled_logprobs,
            )
            entry = queue_entry(structs.replace(group, gid=gid, v_min=v_min, v_max=v_max), len(blob))
            if account and account != entry.env:
                entry = structs.replace(entry, env=account)
            keys = [names.groups, names.blob(gid), names.seen(post), names.state, names.trainers]
            keys += [names.pools, names.lineage, names.old_lineage, names.trained]
            args = [window_s, call, digest, post, *quotas, *lag, *belief]
            args += [entry.env, entry.n, entry.bytes, id_number(gid), *flat_entry(entry)]
            store = ("SET", names.blob(gid), blob, "NX", "EX", BLOB_TTL_S)
            reply = bytes(await self._view.scripts.put(keys=keys, args=args, after=store)).decode()
            if reply.startswith("trained "):
                gid = reply.removeprefix("trained ")
            elif reply == "unfinished":
                return "duplicate" if not digest or await self._holds(gid, group) else "conflict"
            elif reply != "noblob":  # the blob's TTL ran out in between: set it again
                return reply

    async def _holds(self, gid: str, group: Group) -> bool:
        """Whether the stored group `gid` is what was posted as `group`; yes if it was freed just now."""
        try:
            (stored,) = await self._blobs.fetch([gid])
        except LookupError:
            return True
        return pack(structs.replace(stored, versions=None)) == pack(structs.replace(group, versions=None))

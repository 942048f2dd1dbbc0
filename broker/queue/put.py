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
from lachesis.broker.records.groups import DUPLICATE_WINDOW_S, Group, GroupEntry, Limits, ScoredGroup
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
        post, call = gid, f"{self._caller}{next(self._calls):x}"
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
            reply = await _put(
                self._view,
                entry,
                blob,
                post=post,
                call=call,
                digest=digest,
                window_s=window_s,
                limits=limits,
                believed=believed,
            )
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


async def _put(
    view: RunView,
    entry: GroupEntry,
    blob: bytes,
    *,
    post: str,
    call: str,
    digest: str,
    window_s: int,
    limits: Limits,
    believed: Believed | None,
) -> str:
    """put.lua, and before it the blob: what that replies."""
    keys = view.keys
    reply = await view.scripts.put(
        keys=[
            *(keys.groups, keys.blob(entry.gid), keys.seen(post), keys.state, keys.trainers),
            *(keys.pools, keys.lineage, keys.old_lineage, keys.trained),
        ],
        args=[
            *(window_s, call, digest, post),
            *(limits.bytes, limits.sequences, limits.env_bytes, limits.env_sequences),
            *("" if limits.max_lag is None else limits.max_lag, believed.policy if believed else limits.policy),
            *((1, believed.registration, believed.newest) if believed else (0, "", "")),
            *(entry.env, entry.n, entry.bytes, id_number(entry.gid)),
            *flat_entry(entry),
        ],
        after=("SET", keys.blob(entry.gid), blob, "NX", "EX", BLOB_TTL_S),
    )
    return bytes(reply).decode()

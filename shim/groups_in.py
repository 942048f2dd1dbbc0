"""`POST /scored_data` and `/scored_data_list`: groups into the queue. The answer comes when they are stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lachesis.broker import Broker, InvalidGroup
from lachesis.broker.codec import gid_of
from lachesis.broker.records import ScoredGroup, TrainerConfig
from lachesis.broker.validation import check_group
from lachesis.shim.bodies import decode_group, decode_groups, non_finite, read_body
from lachesis.shim.errors import Malformed, path, refusal
from lachesis.shim.pressure import Hold
from lachesis.shim.versions import Versions


class GroupsIn:
    """Decodes, checks and stores posted groups, and keeps those that can't be trained for triage."""

    def __init__(self, broker: Broker, versions: Versions, hold: Callable[[], Hold], max_body_bytes: int) -> None:
        self.counts: Counter[str] = Counter(stored=0, duplicate=0, refused=0)
        self._broker, self._versions, self._hold = broker, versions, hold
        self._max_body_bytes = max_body_bytes

    async def scored_data(self, request: Request) -> Response:
        hold = self._hold()
        await hold.room()
        body = await read_body(request, self._max_body_bytes)
        gid = _gid(request, body)
        try:
            await self.accept(gid, body, hold)
        except InvalidGroup as error:
            await self._bury(gid, body, error)
            raise
        return JSONResponse({"status": "received"})

    async def scored_data_list(self, request: Request) -> Response:
        hold = self._hold()
        await hold.room()
        body = await read_body(request, self._max_body_bytes)
        groups, lax = decode_groups(body)
        config = await self._broker.parties.trainer_config()
        post = _gid(request, body)
        refused = []
        for index, group in enumerate(groups):
            gid = gid_of(f"{post}[{index}]".encode())  # equal groups of one list are different groups
            try:
                await self._accept(gid, group, config, lax=lax, hold=hold)
            except InvalidGroup as error:
                await self._bury(gid, json.dumps(msgspec.to_builtins(group)).encode(), error)
                refused.append(refusal(error, (index,)))
        if refused and len(refused) == len(groups):
            raise Malformed(refused)
        more = {"refused": len(refused), "detail": refused} if refused else {}
        return JSONResponse({"status": "received", "groups_processed": len(groups), **more})

    async def accept(self, gid: str, body: bytes, hold: Hold) -> str:
        """Store the group that a body holds: "stored" or "duplicate". Raises Malformed; InvalidGroup if it can't be trained."""
        groups, lax = decode_group(body)
        return await self._accept(gid, groups[0], await self._broker.parties.trainer_config(), lax=lax, hold=hold)

    async def _accept(
        self, gid: str, group: ScoredGroup, config: TrainerConfig | None, *, lax: bool, hold: Hold
    ) -> str:
        limits = {"max_token_len": config.max_token_len, "batch_size": config.batch_size} if config else {}
        if lax and (found := non_finite(msgspec.to_builtins(group))):
            raise InvalidGroup(path(found[0]), found[1], "must be finite")
        check_group(group, **limits)
        try:
            v_min, v_max = await self._versions.span(group.tokens)
            reply = await hold.store(
                lambda limits: self._broker.queue.put(gid, group, v_min=v_min, v_max=v_max, limits=limits)
            )
        except (OverflowError, UnicodeEncodeError):
            raise _unstorable(group) from None
        self.counts[reply] += 1
        return reply

    async def _bury(self, gid: str, body: bytes, error: InvalidGroup) -> None:
        """Keep it under another id: the same post may be fine for the next trainer."""
        self.counts["refused"] += 1
        await self._broker.queue.bury(f"refused-{gid}", body, "invalid", str(error)[:1000])


def _gid(request: Request, body: bytes) -> str:
    """What makes a repeated post the same post: the client's Idempotency-Key, else its decompressed body."""
    key = request.headers.get("idempotency-key")
    return gid_of(body) if key is None else gid_of(b"Idempotency-Key: " + key.encode())


def _unstorable(group: ScoredGroup) -> InvalidGroup:
    """Numbers beyond 64 bits and text that is not Unicode are JSON that no trainer could read back: which field?"""
    for name in group.__struct_fields__:
        try:
            msgspec.msgpack.encode(getattr(group, name))
        except UnicodeEncodeError as error:
            return InvalidGroup(name, error.object[:100], "must be Unicode text without lone surrogates")
        except OverflowError:
            return InvalidGroup(name, "an integer", "must fit a signed 64-bit integer")
    return InvalidGroup("tokens", "an integer", "must fit a signed 64-bit integer")

"""`POST /scored_data` and `/scored_data_list`: groups into the queue. The answer comes when they are stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import structlog
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lachesis.broker import Broker, InvalidGroup
from lachesis.broker.codec import gid_of
from lachesis.broker.packing import PACKED_TYPE, pack, to_arrays, to_blob, to_scored, unpack, unpacked_bytes
from lachesis.broker.queue import REFUSED_BYTES
from lachesis.broker.records import DUPLICATE_WINDOW_S, Group, ScoredGroup, TokenRecord
from lachesis.broker.redis_errors import describe, trouble
from lachesis.broker.validation import REFUSED, Reader, admit
from lachesis.shim.access import caller_of, environment_of
from lachesis.shim.bodies import check_messages, decode_group, decode_groups, read_body, too_large
from lachesis.shim.errors import Malformed, detail, refusal
from lachesis.shim.large import INLINE_BYTES, Read, is_large, read_apart
from lachesis.shim.pressure import Hold, Size
from lachesis.shim.status import account_of, buffered
from lachesis.shim.versions import Arrival, Versions

log = structlog.get_logger(role="shim")

MAX_LISTS = 250_000  # and objects in a body
MAX_SEQUENCES = 8192  # of a group: each is looked at by itself
INLINE_NESTED_BYTES = 64 << 10  # of a packed group's nested values


class Post(NamedTuple):
    """What a post is known by: the id of its group, and where that is made of a key of the client's, key and body's digest.

    And the token that it came with.
    """

    gid: str
    key: str | None = None
    digest: str = ""
    caller: TokenRecord | None = None


class Accepted(NamedTuple):
    """What became of a valid group: a repeat is not stored; `waiting` sequences wait with one of an odd size."""

    duplicate: bool
    waiting: int | None


class GroupsIn:
    """Decodes, checks and stores posted groups, and keeps those that can't be trained for triage."""

    def __init__(
        self,
        broker: Broker,
        versions: Versions,
        hold: Callable[[], Hold],
        max_body_bytes: int,
        window_s: int = DUPLICATE_WINDOW_S,
        max_lists: int = MAX_LISTS,
        refused_bytes: int = REFUSED_BYTES,
        max_runs: int = 0,
    ) -> None:
        self.counts: Counter[str] = Counter(stored=0, duplicate=0, refused=0)
        self._broker, self._versions, self._hold = broker, versions, hold
        self._max_body_bytes, self._max_lists = max_body_bytes, max_lists
        self._window_s, self._refused_bytes, self._max_runs = window_s, refused_bytes, max_runs

    async def scored_data(self, request: Request) -> Response:
        hold = self._hold()
        await self._broker.enlist(self._max_runs)
        await hold.room()
        body = await read_body(request, self._max_body_bytes)
        post = _post(request, body)
        await self._check_key(post, _in_list(post, 0))
        try:
            accepted = await self.accept(post.gid, body, hold, packed=_is_packed(request), key=post)
        except InvalidGroup as error:
            await self._bury(post.gid, body, error)
            raise
        if accepted.duplicate:
            return JSONResponse({"status": "duplicate", "detail": self._repeated(post)})
        if accepted.waiting is not None:
            return JSONResponse({"status": "buffered", "buffer_size": accepted.waiting})
        return Response(b'{"status":"received"}', media_type="application/json")

    async def scored_data_list(self, request: Request) -> Response:
        hold = self._hold()
        await self._broker.enlist(self._max_runs)
        await hold.room()
        body = await read_body(request, self._max_body_bytes)
        post = _post(request, body)
        await self._check_key(post, post.gid)
        groups: Sequence[Group | ScoredGroup | Read]
        if is_large(body):
            groups, lax = await read_apart(body, "groups", self._max_lists), False
        else:
            groups, lax = decode_groups(body)
        for env_id in {env_of(group) for group in groups}:
            await self._account(post, env_id)  # a list with a group of another token's environment is refused whole
        refused, odd, duplicates = [], [], 0
        for index, group in enumerate(groups):
            gid = _in_list(post, index)
            try:
                if isinstance(group, Read):
                    accepted = await self._accept(gid, await group.group(), hold, packed=group.packed, key=post)
                else:
                    accepted = await self._accept(gid, group, hold, lax=lax, key=post)
                duplicates += accepted.duplicate
                if accepted.waiting is not None:
                    odd.append(accepted.waiting)
            except InvalidGroup as error:
                await self._bury(gid, _posted(group), error)
                refused.append(refusal(error, (index,)))
        if refused and len(refused) == len(groups):
            raise Malformed(refused)
        more: dict[str, Any] = {"buffered": len(odd), "last_buffer_size": odd[-1]} if odd else {}
        more |= {"refused": len(refused), "detail": refused} if refused else {}
        more |= {"duplicates": duplicates} if duplicates else {}
        status = "duplicate" if groups and duplicates == len(groups) else "received"
        return JSONResponse({"status": status, "groups_processed": len(groups), **more})

    async def _check_key(self, post: Post, other: str) -> None:
        """Raise Malformed where the key was used on the other route, for a group that is known as `other`."""
        if post.key is not None and await self._broker.redis.exists(self._broker.keys.seen(other)):
            raise _key_was_used(post)

    async def accept(self, gid: str, body: bytes, hold: Hold, *, packed: bool, key: Post | None = None) -> Accepted:
        """Store the group that a body holds, as JSON or packed.

        Raises Malformed, also where `key` was used for another body; InvalidGroup if the group can't be trained.
        """
        if packed:
            if (group := self._unpack(body)) is not None:
                return await self._accept(gid, group, hold, packed=body, key=key)
        elif not is_large(body):
            groups, lax = decode_group(body)
            return await self._accept(gid, groups[0], hold, lax=lax, key=key)
        (read,) = await read_apart(body, "packed" if packed else "group", self._max_lists)
        return await self._accept(gid, await read.group(), hold, packed=read.packed, key=key)

    async def _accept(
        self,
        gid: str,
        group: Group | ScoredGroup,
        hold: Hold,
        *,
        lax: bool = False,
        packed: bytes = b"",
        key: Post | None = None,
    ) -> Accepted:
        if (count := len(group.tokens)) > MAX_SEQUENCES:
            raise InvalidGroup("tokens", f"{count} sequences", f"must hold at most {MAX_SEQUENCES}")
        arrays = to_arrays(group) if isinstance(group, ScoredGroup) else group
        reader: Reader = "msgpack" if packed else "lax json" if lax else "strict json"
        account = await self._account(key, arrays.env)
        arrival = await self._versions.arrival(arrays)
        try:
            reply = await self._store(gid, arrays, arrival, hold, packed, key, account, reader)
        except InvalidGroup:
            if not arrival.believed:
                raise
            reply = "changed"  # perhaps
        if reply == "changed":
            arrival = await self._versions.arrival(arrays, ask=True)
            reply = await self._store(gid, arrays, arrival, hold, packed, key, account, reader)
        if reply == "conflict":
            raise _key_was_used(key)
        self.counts[reply] += 1
        return Accepted(reply == "duplicate", await buffered(self._broker, arrays.env, len(arrays.tokens)))

    async def _store(
        self,
        gid: str,
        arrays: Group,
        arrival: Arrival,
        hold: Hold,
        packed: bytes,
        key: Post | None,
        account: str,
        reader: Reader,
    ) -> str:
        """Check the group against what the run knew at its arrival, and PUT it. Returns what PUT replies."""
        config = arrival.trainer
        limits = {"max_token_len": config.max_token_len, "batch_size": config.batch_size} if config else {}
        admit(arrays, **limits, reader=reader)
        packed = packed or pack_group(arrays)
        told = self._versions.stamp(arrival, arrays)
        put = partial(
            self._broker.queue.put,
            gid,
            arrays,
            v_min=arrays.v_min,
            v_max=arrays.v_max,
            packed=packed,
            believed=arrival.believed,
            digest=key.digest if key else "",
            window_s=self._window_s,
            account=account,
        )
        reply = await hold.store(lambda limits: put(limits=limits), partial(_size, gid, arrays, packed, account))
        if reply == "stored":
            self._versions.counts.update(told)
        return reply

    async def _account(self, post: Post | None, env_id: int | None) -> str:
        """What a group with that `env_id` is counted under. Raises Denied where that is another token's environment."""
        caller = post.caller if post else None
        env = None
        if caller is not None and env_id is not None:
            env = await environment_of(self._broker, caller, env_id)
        return account_of(caller, env, env_id)

    def _unpack(self, body: bytes) -> Group | None:
        """The group in a packed body; None where it is not for the event loop to decode."""
        if (size := unpacked_bytes(body)) > self._max_body_bytes:
            raise too_large(self._max_body_bytes)
        try:
            group = unpack(body, check=_check_inline) if size <= INLINE_BYTES else None
        except _Large:
            group = None
        if group:
            check_messages(group)
        return group

    def _repeated(self, post: Post) -> str:
        what = "this body" if post.key is None else f"the Idempotency-Key {post.key!r}"
        return (
            f"not stored again: {what} was accepted within the last {self._window_s} s (duplicate_window_s), or its group is "
            "not trained yet; to have equal groups trained, give each post an Idempotency-Key of its own"
        )

    async def _bury(self, gid: str, body: bytes, error: InvalidGroup) -> None:
        """Keep it under another id: the same post may be fine for the next trainer."""
        self.counts["refused"] += 1
        try:
            await self._broker.queue.bury(
                f"{REFUSED}{gid}", body, "invalid", str(error)[:1000], most_bytes=self._refused_bytes
            )
        except RedisError as lost:
            if trouble(lost) is None:
                raise
            log.warning("a refused post is not kept for triage", reason=describe(lost), refused=str(error)[:200])


def _post(request: Request, body: bytes) -> Post:
    """What makes a repeated post the same post: the client's Idempotency-Key, else its decompressed body."""
    key, digest, caller = request.headers.get("idempotency-key"), gid_of(body), caller_of(request)
    if key is None:
        return Post(digest, caller=caller)
    whose = f"{caller.name} " if caller else ""  # nobody can use another token's keys up
    return Post(gid_of(f"{whose}Idempotency-Key: {key}".encode()), key, digest, caller)


def _in_list(post: Post, index: int) -> str:
    """The id of one group of a list: equal ones are different groups."""
    return gid_of(f"{post.gid}[{index}]".encode())


def _key_was_used(post: Post | None) -> Malformed:
    rule = "was used for another body; use a new key for each post, and the same one to repeat it"
    return Malformed([detail("value_error", ["Idempotency-Key"], post and post.key, rule, of="header")])


class _Large(Exception):
    """Not for the event loop to decode."""


def _check_inline(nested: bytes) -> None:
    if len(nested) > INLINE_NESTED_BYTES:
        raise _Large


def _posted(group: Group | ScoredGroup | Read) -> bytes:
    """The JSON of one group of a list."""
    if isinstance(group, Read):
        if group.posted:
            return group.posted
        group = unpack(group.packed)
    scored = to_scored(group) if isinstance(group, Group) else group
    return json.dumps(msgspec.to_builtins(scored)).encode()


def pack_group(group: Group) -> bytes:
    """The packed form. Raises InvalidGroup for numbers and text that can't be packed."""
    try:
        return pack(group)
    except (OverflowError, UnicodeEncodeError):
        raise _unstorable(group) from None


def env_of(group: Group | ScoredGroup | Read) -> int | None:
    return group.env_id if isinstance(group, ScoredGroup) else group.env


def _size(gid: str, group: Group, packed: bytes, account: str) -> Size:
    """What the group adds to the queue once it is stored."""
    blob = to_blob(
        packed,
        gid,
        v_min=group.v_min,
        v_max=group.v_max,
        versions=group.versions,
        sampled_logprobs=group.sampled_logprobs,
    )
    return Size(account, len(group.tokens), len(blob))


def _is_packed(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith(PACKED_TYPE)


def _unstorable(group: Group) -> InvalidGroup:
    """Numbers beyond 64 bits and text that is not Unicode are JSON that no trainer could read back: which field?"""
    for name, value in {"env_id": group.env, **group.rest}.items():
        try:
            msgspec.msgpack.encode(value)
        except UnicodeEncodeError as error:
            return InvalidGroup(name, error.object[:100], "must be Unicode text without lone surrogates")
        except OverflowError:
            break
    return InvalidGroup(name, "an integer", "must fit a signed 64-bit integer")

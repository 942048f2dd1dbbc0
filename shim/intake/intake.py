"""The one way in for a posted group: decode, admit, annotate, put. Read this first; each step is a file beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from typing import NamedTuple

import structlog
from redis.exceptions import RedisError

from lachesis.broker import Broker, InvalidGroup
from lachesis.broker.queue.admission import REFUSED
from lachesis.broker.records.blobs import to_blob
from lachesis.broker.records.groups import DUPLICATE_WINDOW_S, Group
from lachesis.broker.records.registrations import TokenRecord
from lachesis.broker.retention.dead_letters import REFUSED_BYTES
from lachesis.broker.store.connection import patience
from lachesis.broker.store.redis_errors import describe, trouble
from lachesis.shim.errors import Malformed, detail
from lachesis.shim.http.access import account_of, environment_of
from lachesis.shim.intake.admission import admit_post
from lachesis.shim.intake.backpressure import Backpressure, Deadline
from lachesis.shim.intake.decode import Bounds, Decoded, decode_list, decode_post
from lachesis.shim.intake.large_bodies import Read
from lachesis.shim.intake.post import Post
from lachesis.shim.intake.room import Size
from lachesis.shim.intake.versions import Versions, annotate

STATUS_PATIENCE_S = 1.0  # what only tells of the queue waits this long for a Redis in trouble

log = structlog.get_logger(role="shim")


class Accepted(NamedTuple):
    """What became of a valid group: a repeat is not stored; `waiting` sequences wait with one of an odd size."""

    duplicate: bool
    waiting: int | None


class Refused(NamedTuple):
    """A group of a list that can't be trained: its id, its JSON, and why."""

    gid: str
    body: bytes
    error: InvalidGroup


class Intake:
    """Takes groups into one run's queue. `counts`, of groups: what became of them."""

    def __init__(
        self,
        broker: Broker,
        versions: Versions,
        backpressure: Backpressure,
        bounds: Bounds,
        *,
        window_s: int = DUPLICATE_WINDOW_S,
        refused_bytes: int = REFUSED_BYTES,
    ) -> None:
        self.counts: Counter[str] = Counter(stored=0, duplicate=0, refused=0)
        self._broker, self._versions, self._backpressure, self._bounds = broker, versions, backpressure, bounds
        self._window_s, self._refused_bytes = window_s, refused_bytes

    async def accept(self, post: Post, deadline: Deadline) -> Accepted:
        """Store the group that a body holds, before the deadline.

        Raises Malformed, also where the post's key was used for another body; InvalidGroup if the group can't be trained;
        Denied where it is another token's environment's; and HTTPException as `decode_post` and `until_stored` do.
        """
        await self._check_key(post, post.gid_in_list(0))
        return await self._store(post.gid, await decode_post(post, self._bounds), post, deadline)

    async def accept_list(self, post: Post, deadline: Deadline) -> AsyncIterator[Accepted | Refused]:
        """The same for each group of a list, in order. What is raised, nothing after it is stored."""
        await self._check_key(post, post.gid)
        groups = await decode_list(post, self._bounds)
        for env_id in {
            decoded.env for decoded in groups
        }:  # a list with a group that is another token's is refused whole
            await self._account(post.caller, env_id)
        for index, decoded in enumerate(groups):
            gid = post.gid_in_list(index)
            try:
                outcome: Accepted | Refused = await self._store(gid, decoded, post, deadline)
            except InvalidGroup as error:
                outcome = Refused(gid, decoded.json(), error)
            yield outcome

    async def _store(self, gid: str, decoded: Decoded | Read, post: Post, deadline: Deadline) -> Accepted:
        group = await decoded.arrays()
        account = await self._account(post.caller, group.env)
        for ask in (False, True):  # again where the run is not what it was believed to be
            arrival = await self._versions.arrival(group, ask=ask)
            try:
                packed = admit_post(group, arrival.trainer, decoded.reader, decoded.packed)
                annotated, counts = annotate(arrival, group)
                put = partial(
                    self._broker.queue.put,
                    gid,
                    annotated,
                    v_min=annotated.v_min,
                    v_max=annotated.v_max,
                    packed=packed,
                    believed=arrival.believed,
                    digest=post.digest,
                    window_s=self._window_s,
                    account=account,
                )
                size = partial(_size, gid, annotated, packed, account)
                reply = await self._backpressure.until_stored(deadline, put, size)
            except InvalidGroup:
                if not arrival.believed:
                    raise
                continue
            if reply != "changed":
                break
        if reply == "conflict":
            raise _key_was_used(post)
        if reply == "stored":
            self._versions.counts.update(counts)
        self.counts[reply] += 1
        return Accepted(reply == "duplicate", await self._waiting(group.env, len(group.tokens)))

    async def _check_key(self, post: Post, other: str) -> None:
        """Raise Malformed where the key was used on the other route, for a group that is known as `other`."""
        if post.key is not None and await self._broker.redis.exists(self._broker.keys.seen(other)):
            raise _key_was_used(post)

    async def _account(self, caller: TokenRecord | None, env_id: int | None) -> str:
        """What a group with that `env_id` is counted under. Raises Denied where that is another token's environment."""
        env = None
        if caller is not None and env_id is not None:
            env = await environment_of(self._broker, caller, env_id)
        return account_of(caller, env, env_id)

    async def _waiting(self, env_id: int | None, sequences: int) -> int | None:
        """What upstream calls `buffer_size`, where a group of `sequences` is of another size than its environment's.

        That is how many sequences in such groups wait, less those that make up groups of its size: 0 if these just did.
        None also where Redis can't tell any more: the group is stored, and its sender must hear nothing else.
        """
        try:
            with patience(STATUS_PATIENCE_S):
                env = None if env_id is None else await self._broker.registry.touch_env(env_id)
                if env is None or env.config.group_size == sequences:
                    return None
                return await self._broker.queue.odd_sequences(env)
        except RedisError as error:
            log.warning("stored, but its buffer could not be counted", env=env_id, reason=describe(error))
            return None

    async def keep_refused(self, gid: str, body: bytes, error: InvalidGroup) -> None:
        """Keep it for triage, under another id: the same post may be fine for the next trainer."""
        self.counts["refused"] += 1
        try:
            await self._broker.queue.keep_refused(
                f"{REFUSED}{gid}", body, "invalid", str(error)[:1000], most_bytes=self._refused_bytes
            )
        except RedisError as lost:
            if trouble(lost) is None:
                raise
            log.warning("a refused post is not kept for triage", reason=describe(lost), refused=str(error)[:200])


def _key_was_used(post: Post) -> Malformed:
    rule = "was used for another body; use a new key for each post, and the same one to repeat it"
    return Malformed([detail("value_error", ["Idempotency-Key"], post.key, rule, of="header")])


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

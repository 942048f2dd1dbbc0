"""A post's body into groups: here where that is quick, else by the workers of large_bodies.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lachesis.broker import InvalidGroup
from lachesis.broker.queue.admission import Reader
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import to_arrays, unpack, unpacked_bytes
from lachesis.shim.http.body import too_large
from lachesis.shim.intake.admission import MAX_SEQUENCES, env_of
from lachesis.shim.intake.json_bodies import check_messages, decode_group, decode_groups
from lachesis.shim.intake.large_bodies import INLINE_BYTES, Read, is_large, read_apart, to_json
from lachesis.shim.intake.post import Post

MAX_LISTS = 250_000  # and objects in a large body
INLINE_NESTED_BYTES = 64 << 10  # of a packed group's nested values


class Bounds(NamedTuple):
    """How much a body may hold: bytes, of a packed one once it is decompressed, and lists and objects of a large one."""

    bytes: int
    lists: int = MAX_LISTS


class Decoded(NamedTuple):
    """A group that was decoded here, by which reader. One that a worker has decoded is a `Read`."""

    group: Group | ScoredGroup
    reader: Reader
    packed: bytes = b""

    @property
    def env(self) -> int | None:
        return env_of(self.group)

    async def arrays(self) -> Group:
        """Raises InvalidGroup for more sequences than are looked at here, and for integers of more than 64 bits."""
        if (count := len(self.group.tokens)) > MAX_SEQUENCES:
            raise InvalidGroup("tokens", f"{count} sequences", f"must hold at most {MAX_SEQUENCES}")
        return to_arrays(self.group) if isinstance(self.group, ScoredGroup) else self.group

    def json(self) -> bytes:
        """The group as it was posted, or another JSON that means the same."""
        return to_json(self.group)


async def decode_post(post: Post, bounds: Bounds) -> Decoded | Read:
    """The group that a body holds, as JSON or packed.

    Raises Malformed; InvalidGroup where it is no packed group, or a worker finds that it can't be trained; HTTPException
    as `read_apart` does, and 413 where it would decompress to more than the bound.
    """
    if post.packed:
        if (group := _unpack(post.body, bounds.bytes)) is not None:
            return Decoded(group, "msgpack", post.body)
    elif not is_large(post.body):
        groups, lax = decode_group(post.body)
        return Decoded(groups[0], _reader(lax))
    (read,) = await read_apart(post.body, "packed" if post.packed else "group", bounds.lists)
    return read


async def decode_list(post: Post, bounds: Bounds) -> Sequence[Decoded | Read]:
    """The groups of a body that is a list of them, as JSON. Raises Malformed if one of them is, and as `read_apart` does."""
    if is_large(post.body):
        return await read_apart(post.body, "groups", bounds.lists)
    groups, lax = decode_groups(post.body)
    return [Decoded(group, _reader(lax)) for group in groups]


def _reader(lax: bool) -> Reader:
    return "lax json" if lax else "strict json"


class _Large(Exception):
    """Not for the event loop to decode."""


def _check_inline(nested: bytes) -> None:
    if len(nested) > INLINE_NESTED_BYTES:
        raise _Large


def _unpack(body: bytes, max_bytes: int) -> Group | None:
    """The group in a packed body; None where it is not for the event loop to decode."""
    if (size := unpacked_bytes(body)) > max_bytes:
        raise too_large(max_bytes)
    try:
        group = unpack(body, check=_check_inline) if size <= INLINE_BYTES else None
    except _Large:
        group = None
    if group:
        check_messages(group)
    return group

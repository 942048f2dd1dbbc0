"""What was posted, as far as that is known before it is decoded."""

from __future__ import annotations

from typing import NamedTuple

from starlette.requests import Request

from lachesis.broker.records.entries import gid_of
from lachesis.broker.records.packing import PACKED_TYPE
from lachesis.broker.records.registrations import TokenRecord
from lachesis.shim.http.access import caller_of
from lachesis.shim.http.body import read_body


class Post(NamedTuple):
    """A body, decompressed, and what makes a repeated post the same post: the client's Idempotency-Key, else the body."""

    gid: str  # the id of its group; of a list, what the ids of its groups are made of
    body: bytes
    packed: bool = False  # as PACKED_TYPE, and not JSON
    key: str | None = None
    digest: str = ""  # of the body, where the id is made of a key
    caller: TokenRecord | None = None  # the token that it came with

    def gid_in_list(self, index: int) -> str:
        """The id of one group of a list: equal ones are different groups."""
        return gid_of(f"{self.gid}[{index}]".encode())


async def read_post(request: Request, max_body_bytes: int) -> Post:
    """Raises InvalidGzip, Malformed for another compression, and HTTPException 413 where the body has more than `max_body_bytes`."""
    body = await read_body(request, max_body_bytes)
    packed = request.headers.get("content-type", "").startswith(PACKED_TYPE)
    key, digest, caller = request.headers.get("idempotency-key"), gid_of(body), caller_of(request)
    if key is None:
        return Post(digest, body, packed, caller=caller)
    whose = f"{caller.name} " if caller else ""  # nobody can use another token's keys up
    return Post(gid_of(f"{whose}Idempotency-Key: {key}".encode()), body, packed, key, digest, caller)

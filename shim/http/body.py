"""Request bodies: bounded reading, and gzip."""

from __future__ import annotations

import io
import re
from typing import Any

import anyio.to_thread
from isal import igzip, isal_zlib
from starlette.exceptions import HTTPException
from starlette.requests import Request

from lachesis.shim.errors import InvalidGzip, Malformed, detail
from lachesis.shim.http.delivery import in_whole

_BadStream: Any = isal_zlib.error  # its stubs make an instance of it

SMALL_BYTES = 64 << 10  # of a body that holds no groups

INLINE_BYTES, INLINE_INFLATED = 1 << 20, 4 << 20  # bodies of more, compressed or not, are inflated in a thread

CHUNK_BYTES = 1 << 20
# compressions that are not undone; some say so of a body that is not compressed
_UNKNOWN = re.compile(r"\b(deflate|br|zstd|gzip\b.*gzip)\b", re.IGNORECASE)


async def read_body(request: Request, limit: int) -> bytes:
    """The decompressed body. Raises InvalidGzip, Malformed, and HTTPException 413 where it has more than `limit` bytes."""
    body = await _read_plain(request, limit)
    encoding = request.headers.get("content-encoding", "")
    if _UNKNOWN.search(encoding) and body.lstrip()[:1] not in b"{[":
        rule = "a body may be compressed with gzip, once, or not at all"
        raise Malformed([detail("value_error", ["Content-Encoding"], encoding, rule, of="header")])
    return body


async def _read_plain(request: Request, limit: int) -> bytes:
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large(limit)
    in_whole(request.scope)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        if chunk:  # the last one is empty, and to join one alone copies nothing
            chunks.append(chunk)
    body = b"".join(chunks) if size <= INLINE_BYTES else await anyio.to_thread.run_sync(b"".join, chunks)
    if "gzip" not in request.headers.get("content-encoding", "").lower():
        return body
    if len(body) <= INLINE_BYTES:
        try:
            return inflate(body, min(limit, INLINE_INFLATED))
        except HTTPException:
            if limit <= INLINE_INFLATED:
                raise
    return await anyio.to_thread.run_sync(inflate, body, limit)


def inflate(body: bytes, limit: int) -> bytes:
    """Decompress gzip (several members, zero padding) to at most `limit` bytes; the same errors as `read_body`."""
    member = isal_zlib.decompressobj(wbits=16 + isal_zlib.MAX_WBITS)
    body = body.lstrip(b"\0")
    try:
        parts = [member.decompress(body, limit + 1)]
        if body and len(parts[0]) <= limit and not member.eof:
            raise InvalidGzip  # it ends too early
        size = len(parts[0])
        if rest := member.unused_data.lstrip(b"\0"):  # rare; a file reads on where a member ends, without copying
            members = igzip.IGzipFile(fileobj=io.BytesIO(rest))
            while size <= limit and (part := members.read(min(CHUNK_BYTES, limit + 1 - size))):
                parts.append(part)
                size += len(part)
    except (_BadStream, EOFError, OSError):
        raise InvalidGzip from None
    if size > limit:
        raise too_large(limit)
    return b"".join(parts)


def too_large(limit: int) -> HTTPException:
    whose = "of this route" if limit == SMALL_BYTES else "max_body_bytes"
    return HTTPException(413, f"the body is larger than {limit} bytes ({whose})")

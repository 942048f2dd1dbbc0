"""Request bodies: bounded reading, gzip, and JSON into records.

direct.py reads nearly every posted group. What it leaves, and the small records, msgspec decodes where they are strictly
of the right types. The rest (a number sent as a string, 1.0 for an integer, a NaN literal, a mistake) goes through
pydantic, whose lax rules and error entries are those that clients of the Atropos API know.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import anyio.to_thread
import msgspec
from isal import igzip, isal_zlib
from msgspec import Struct
from pydantic import BaseModel, FailFast, TypeAdapter, ValidationError, create_model
from starlette.exceptions import HTTPException
from starlette.requests import Request

from lachesis.broker.records import Group, ScoredGroup
from lachesis.broker.validation import MESSAGE_RULE, broken_message, non_finite
from lachesis.shim.connection import in_whole
from lachesis.shim.direct import read_group, read_groups
from lachesis.shim.errors import SHOWN_ERRORS, InvalidGzip, Location, Malformed, detail

_BadStream: Any = isal_zlib.error  # its stubs make an instance of it
SMALL_BYTES = 64 << 10  # of a body that holds no groups
ALL_ERRORS_BYTES = 16 << 10  # of what is larger, only the first error of each list is looked for
INLINE_BYTES, INLINE_INFLATED = 1 << 20, 4 << 20  # bodies of more, compressed or not, are inflated in a thread
CHUNK_BYTES = 1 << 20
_UNKNOWN = re.compile(
    r"\b(deflate|br|zstd|gzip\b.*gzip)\b", re.IGNORECASE
)  # some say so of a body that is not compressed
_NOT_STRICT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

T = TypeVar("T", bound=Struct)


class Posted(NamedTuple):
    """Well-formed groups. Where the lax rules were needed, numbers may be NaN or infinite."""

    groups: Sequence[Group | ScoredGroup]
    lax: bool = False


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


def decode(kind: type[T], body: bytes) -> T:
    """The record in a JSON body. Raises Malformed."""
    try:
        found: T = _decoder(kind).decode(body)
        return found
    except _NOT_STRICT:
        record = _structs(kind, _validate(kind, body))
        _check_finite(record)
        _check_text(record)
        return record


def decode_group(body: bytes) -> Posted:
    """One scored group. Raises Malformed; what can't be trained is for others to find."""
    if (direct := read_group(body)) is not None:
        posted = Posted([direct])
    else:
        try:
            posted = Posted([_decoder(ScoredGroup).decode(body)])
        except _NOT_STRICT:
            posted = Posted([_structs(ScoredGroup, _validate(ScoredGroup, body))], lax=True)
    check_messages(posted.groups[0])
    return posted


def decode_groups(body: bytes) -> Posted:
    """A list of scored groups. Raises Malformed if one of them is."""
    if (direct := read_groups(body)) is not None:
        posted = Posted(direct)
    else:
        try:
            posted = Posted(_decoder(list[ScoredGroup]).decode(body))
        except _NOT_STRICT:
            models = _validate(list[ScoredGroup], body)
            posted = Posted([_structs(ScoredGroup, model) for model in models], lax=True)
    for index, group in enumerate(posted.groups):
        check_messages(group, (index,))
    return posted


def too_large(limit: int) -> HTTPException:
    whose = "of this route" if limit == SMALL_BYTES else "max_body_bytes"
    return HTTPException(413, f"the body is larger than {limit} bytes ({whose})")


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


class _ToFirst(FailFast):
    """pydantic's, as part of a union of types, whose parts have to be hashable."""

    __hash__ = object.__hash__


@cache
def _model(kind: type[Struct], first: bool) -> type[BaseModel]:
    fields: dict[str, Any] = {
        field.name: (
            _to_first_error(field.type) if first else field.type,
            ... if field.default is msgspec.NODEFAULT else field.default,
        )
        for field in msgspec.structs.fields(kind)
    }
    return create_model(kind.__name__, **fields)


@cache
def _adapter(kind: Any, first: bool) -> TypeAdapter[Any]:
    if get_origin(kind) is list:
        of: Any = list[_model(get_args(kind)[0], first)]  # type: ignore[misc]
        return TypeAdapter(Annotated[of, _ToFirst()] if first else of)
    return TypeAdapter(_model(kind, first))


def _to_first_error(kind: Any) -> Any:
    """The type, whose lists are validated to their first error: a wrong list of a million has a million."""
    origin, of = get_origin(kind), get_args(kind)
    if origin is list:
        return Annotated[list[_to_first_error(of[0])], _ToFirst()]  # type: ignore[misc]
    if origin is tuple and of[-1] is ...:
        return Annotated[kind, _ToFirst()]
    if origin in (Union, UnionType):
        return Union[tuple(map(_to_first_error, of))]  # noqa: UP007
    return kind


def _structs(kind: type[T], model: BaseModel) -> T:
    return kind(**{name: getattr(model, name) for name in kind.__struct_fields__})


def _loads(body: bytes) -> Any:
    if not body:
        raise Malformed([detail("missing", (), None, "Field required")])
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        place, reason = error.pos, error.msg
    except UnicodeDecodeError as error:
        place, reason = error.start, "not UTF-8"
    except RecursionError:
        place, reason = 0, "nested too deeply"
    except ValueError as error:  # an integer of thousands of digits
        place, reason = 0, str(error)
    entry = detail(
        "json_invalid", (), body[place : place + 20].decode(errors="replace"), f"JSON decode error: {reason}"
    )
    raise Malformed([{**entry, "loc": ["body", place], "input": {}, "ctx": {"error": reason}}])


def _validate(kind: Any, body: bytes) -> Any:
    value = _loads(body)
    try:
        return _adapter(kind, len(body) > ALL_ERRORS_BYTES).validate_python(value, from_attributes=True)
    except ValidationError as error:
        entries = error.errors(include_url=False, include_context=False)[:SHOWN_ERRORS]
        raise Malformed(
            [detail(entry["type"], entry["loc"], entry["input"], entry["msg"]) for entry in entries]
        ) from None


def _check_finite(record: Struct) -> None:
    if found := non_finite(msgspec.to_builtins(record)):
        raise Malformed([detail("finite_number", *found, "must be finite")])


def _check_text(record: Struct) -> None:
    """JSON can spell half of a character, a lone surrogate. No text can be kept or answered with it."""
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, str) and not _is_unicode(value):
            rule = "must be Unicode text without lone surrogates"
            raise Malformed([detail("string_unicode", [name], value.encode(errors="replace").decode(), rule)])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_messages(group: Group | ScoredGroup, prefix: Location = ()) -> None:
    """Raise Malformed unless every message has what upstream asks of it."""
    messages = group.rest.get("messages") if isinstance(group, Group) else group.messages
    if broken := broken_message(messages):
        row, column, message = broken
        raise Malformed([detail("value_error", [*prefix, "messages", row, column], message, MESSAGE_RULE)])

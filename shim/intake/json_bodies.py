"""JSON into groups and records.

simdjson_decoder.py reads nearly every posted group. What it leaves, and the small records, msgspec decodes where they
are strictly of the right types. The rest (a number sent as a string, 1.0 for an integer, a NaN literal, a mistake) goes
through pydantic, whose lax rules and error entries are those that clients of the Atropos API know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Struct
from pydantic import BaseModel, FailFast, TypeAdapter, ValidationError, create_model

from lachesis.broker.queue.admission import MESSAGE_RULE, broken_message, non_finite
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.shim.errors import SHOWN_ERRORS, Location, Malformed, detail
from lachesis.shim.intake.simdjson_decoder import read_group, read_groups

ALL_ERRORS_BYTES = 16 << 10  # of what is larger, only the first error of each list is looked for
_NOT_STRICT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

T = TypeVar("T", bound=Struct)


class Posted(NamedTuple):
    """Well-formed groups. Where the lax rules were needed, numbers may be NaN or infinite."""

    groups: Sequence[Group | ScoredGroup]
    lax: bool = False


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

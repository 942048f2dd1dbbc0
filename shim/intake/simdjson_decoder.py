"""Posted groups straight from JSON into arrays: one pass, and no Python object per number.

simdjson's types are strict, which suits nearly every post. What it refuses, and the little that it would read otherwise
than the lax rules of the Atropos API, is left to json_bodies.py; both ways give the same groups. So is what is long: simdjson keeps the length of a list in 24 bits,
and pysimdjson, which believes it, writes behind a list that has more (docs/security.md).
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from simdjson import Array, Object, Parser

from lachesis.broker.records.entries import narrowed
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import REST

LONGEST = 4 << 20  # bytes of a body; a parser keeps fourteen times as much. A longer one msgspec reads about as fast
NUMBERS = ("tokens", "masks", "scores", "advantages", "ref_logprobs", "inference_logprobs")

_parser = Parser()
_types = {field.name: field.type for field in msgspec.structs.fields(ScoredGroup)}


class _Unusual(Exception):
    """Not for this path."""


def read_group(body: bytes) -> Group | None:
    """The group in a JSON body; None where the body needs the lax rules, or a 422."""
    found = _read(body, many=False)
    return found[0] if found else None


def read_groups(body: bytes) -> list[Group] | None:
    """The same for a list of groups."""
    return _read(body, many=True)


def _read(body: bytes, *, many: bool) -> list[Group] | None:
    if len(body) > LONGEST:
        return None
    try:  # references to the document end with this function; before that the parser can't be used again
        document = _parser.parse(body)
        objects = list(_is(Array, document)) if many else [document]
        groups = [_group(_is(Object, item)) for item in objects]
        _check_flat(body, objects, groups, many)
    except (_Unusual, msgspec.ValidationError, ValueError, TypeError, KeyError, RuntimeError):
        return None
    return groups


def _group(document: Any) -> Group:
    keys = list(document)
    if len(set(keys)) < len(keys):  # simdjson takes the first of a repeated key, JSON libraries take the last
        raise _Unusual
    found = {name: document[name] for name in keys if name in _types}
    rest = {name: _plain(name, found[name]) for name in REST if found.get(name) is not None}
    return Group(
        env=_plain("env_id", found.get("env_id")),
        tokens=_rows(found["tokens"], "i"),
        masks=_rows(found["masks"], "i"),
        scores=_numbers(found["scores"], "d"),
        advantages=_optional_rows(found.get("advantages")),
        ref_logprobs=_optional_rows(found.get("ref_logprobs")),
        inference_logprobs=_optional_rows(found.get("inference_logprobs")),
        rest=rest,
        versions=_plain("weight_versions", found.get("weight_versions")),
    )


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise _Unusual
    return value


def _numbers(values: Any, kind: str) -> np.ndarray:
    if kind == "i":
        return narrowed(np.frombuffer(_is(Array, values).as_buffer(of_type="i"), dtype="<i8"), "<i4")
    return np.frombuffer(_is(Array, values).as_buffer(of_type="d"), dtype="<f8")


def _rows(rows: Any, kind: str) -> list[np.ndarray]:
    """Views of one array: of lists within lists, `as_buffer` makes one buffer."""
    values, found, start = _numbers(rows, kind), [], 0
    for row in rows:
        end = start + len(_is(Array, row))
        found.append(values[start:end])
        start = end
    return found


def _optional_rows(rows: Any) -> list[np.ndarray] | None:
    return None if rows is None else _rows(rows, "d")


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Object):
        value = value.as_dict()
    elif isinstance(value, Array):
        value = value.as_list()
    return msgspec.convert(value, _types[name])


def _check_flat(body: bytes, objects: list[Any], groups: list[Group], many: bool) -> None:
    """Raise unless no number among a group's numbers is a list: `as_buffer` flattens those silently.

    Then the body has exactly as many opening brackets as it should have.
    """
    opened = int(np.count_nonzero(np.frombuffer(body, dtype="u1") == ord("[")))
    lists = int(many)
    for group in groups:
        ragged = (group.tokens, group.masks, group.advantages, group.ref_logprobs, group.inference_logprobs)
        lists += 1 + sum(1 + len(rows) for rows in ragged if rows is not None)
    if opened == lists:
        return
    if b"\\u005" in body:  # "[" may be spelled "\u005b", which can't be counted
        raise _Unusual
    if opened != lists + sum(_brackets(key, item[key]) for item in objects for key in item if key not in NUMBERS):
        raise _Unusual


def _brackets(key: str, value: Any) -> int:
    if "\0" in key:  # simdjson looks it up as if it ended there
        raise _Unusual
    text: Any = value  # the stubs are wrong about `mini`
    text = text.mini if isinstance(value, (Array, Object)) else str(value).encode()
    return key.count("[") + int(text.count(b"["))

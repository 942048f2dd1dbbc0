"""What may become part of a run: `admit`, for every way in (posts, packed posts, `dead requeue`, `replay`, archives).

A group that is admitted can be kept, trained, and handed out again: its id can be part of a key and of a list of ids, its
shapes agree, its numbers are finite, and its nested fields are JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson

from lachesis.broker.errors import InvalidGroup
from lachesis.broker.records.blobs import from_blob
from lachesis.broker.records.groups import Group, Spans

NEWEST = 2**53  # no version is newer: Lua and JavaScript count so far
MOST_SEQUENCES = 1 << 20  # of a group: no batch has more
MOST_LISTS = 250_000  # of a group that somebody else kept
ENV_IDS = range(-(2**63), 2**63)
TOKEN_FIELDS = ("masks", "advantages", "ref_logprobs", "inference_logprobs", "sampled_logprobs")
MESSAGE_RULE = "Message must have 'role' and 'content' fields"  # upstream's words
REFUSED = "refused-"  # begins the ids of refused posts, and no others

_ID = re.compile(rf"(?!{REFUSED})[A-Za-z0-9~-]{{1,128}}")

Location = Sequence[str | int]
Reader = Literal["strict json", "lax json", "msgpack"]


def admit(group: Group, *, max_token_len: int = -1, batch_size: int = -1, reader: Reader = "msgpack") -> None:
    """Raise InvalidGroup, naming field, value and rule, unless the group may become part of a run.

    A group that was stored before is looked at whole, with its id and versions; one that is yet to get them without.

    Args:
        max_token_len, batch_size: as for `check_group`.
        reader: what its nested fields were read by: JSON holds no other types, and strict JSON no NaN.
    """
    if group.gid:
        check_id(group.gid)
    if group.env is not None and group.env not in ENV_IDS:
        raise InvalidGroup("env_id", group.env, "must fit a signed 64-bit integer")
    check_group(group, max_token_len=max_token_len, batch_size=batch_size)
    _check_nested(group.rest, reader)
    if (group.v_min, group.v_max) != (-1, -1):
        check_bounds(group.v_min, group.v_max)
        for index, spans in enumerate(group.versions or ()):
            if outside := next((span for span in spans if not group.v_min <= span[0] <= group.v_max), None):
                rule = f"must be of a version between v_min and v_max, {group.v_min} and {group.v_max}"
                raise InvalidGroup(f"weight_versions[{index}]", outside, rule)


def admit_stored(blob: bytes, gid: str) -> Group:
    """The group in a blob of whatever origin, which was kept under the id `gid`. Raises InvalidGroup as `admit` does."""
    check_id(gid)
    group = from_blob(blob, MOST_LISTS)
    if group.gid != gid:
        raise InvalidGroup("gid", group.gid[:100], f"must be the id that it is kept under, {gid!r}")
    admit(group)
    if broken := broken_message(group.rest.get("messages")):
        row, column, message = broken
        raise InvalidGroup(f"messages[{row}][{column}]", message, MESSAGE_RULE)
    return group


def check_id(gid: str) -> None:
    """Raise InvalidGroup unless it can be a group's id."""
    if not _ID.fullmatch(gid):
        rule = f"must be 1 to 128 letters, digits, '-' and '~', and not begin with {REFUSED!r}"
        raise InvalidGroup("gid", gid[:100], rule)


def check_bounds(v_min: int, v_max: int) -> None:
    """Raise InvalidGroup unless these can be the oldest and newest version of a group's tokens."""
    if not 0 <= v_min <= v_max <= NEWEST:
        raise InvalidGroup("v_min, v_max", [v_min, v_max], "must be versions, 0 to 2^53, the oldest first")


def check_group(group: Group, *, max_token_len: int = -1, batch_size: int = -1) -> None:
    """Raise InvalidGroup, naming field, value and rule, unless every sequence can be trained.

    Args:
        max_token_len: longest sequence the trainer takes, in tokens; not positive: no limit.
        batch_size: sequences of one step; a larger group could never enter a batch. Not positive: not known.
    """
    count = len(group.tokens)
    if count == 0:
        raise InvalidGroup("tokens", [], "must hold at least one sequence")
    if count > MOST_SEQUENCES:
        raise InvalidGroup(
            "tokens", f"{count} sequences", f"must not exceed {MOST_SEQUENCES}, of which no batch has more"
        )
    _check_batch(count, batch_size)
    if len(group.scores) != count:
        raise InvalidGroup("scores", f"{len(group.scores)} values", f"must have one per sequence, {count}")
    _check_finite("scores", group.scores)
    lengths = list(map(len, group.tokens))
    for index, length in enumerate(lengths):
        if length == 0:
            raise InvalidGroup(f"tokens[{index}]", [], "must hold at least one token")
        _check_length(index, length, max_token_len)
    if np.concatenate(group.tokens).min() < 0:  # one pass where all is well
        index, lowest = next((i, int(row.min())) for i, row in enumerate(group.tokens) if row.min() < 0)
        raise InvalidGroup(f"tokens[{index}]", lowest, "token ids must not be negative")
    for name in TOKEN_FIELDS:
        _check_rows(name, getattr(group, name), group.tokens)
    if group.versions is not None:
        _check_versions(group.versions, lengths)


def check_fits(group: Group, *, max_token_len: int = -1, batch_size: int = -1) -> None:
    """Raise InvalidGroup where a group that is otherwise admitted is more than the trainer takes; see `check_group`."""
    _check_batch(len(group.tokens), batch_size)
    for index, row in enumerate(group.tokens):
        _check_length(index, len(row), max_token_len)


def _check_batch(count: int, batch_size: int) -> None:
    if 0 < batch_size < count:
        raise InvalidGroup("tokens", f"{count} sequences", f"must not exceed the trainer's batch_size of {batch_size}")


def _check_length(index: int, length: int, max_token_len: int) -> None:
    if 0 < max_token_len < length:
        rule = f"must not exceed the trainer's max_token_len of {max_token_len}"
        raise InvalidGroup(f"tokens[{index}]", f"{length} tokens", rule)


def _check_rows(name: str, rows: Sequence[np.ndarray] | None, tokens: Sequence[np.ndarray]) -> None:
    if not rows and name != "masks":  # None, or the empty list some environments send for "none"
        return
    rows = rows or []
    if len(rows) != len(tokens):
        raise InvalidGroup(name, f"{len(rows)} rows", f"must have one per sequence, {len(tokens)}")
    for index, (row, sequence) in enumerate(zip(rows, tokens, strict=True)):
        if len(row) != len(sequence):
            raise InvalidGroup(
                f"{name}[{index}]", f"{len(row)} values", f"must be as long as its tokens, {len(sequence)}"
            )
    if name != "masks" and not np.isfinite(np.concatenate(rows)).all():
        for index, row in enumerate(rows):
            _check_finite(f"{name}[{index}]", row)


def _check_versions(rows: Sequence[Spans], lengths: Sequence[int]) -> None:
    if len(rows) != len(lengths):
        raise InvalidGroup("weight_versions", f"{len(rows)} rows", f"must have one per sequence, {len(lengths)}")
    for index, (spans, length) in enumerate(zip(rows, lengths, strict=True)):
        last = 0
        for number, (version, start, end) in enumerate(spans):
            if not (0 <= version <= NEWEST and last <= start < end <= length):
                rule = f"must be [version, start, end] in order, within the {length} tokens, no version below 0"
                raise InvalidGroup(f"weight_versions[{index}][{number}]", [version, start, end], rule)
            last = end


def _check_finite(name: str, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        position = int(finite.argmin())
        raise InvalidGroup(f"{name}[{position}]", float(values[position]), "must be finite")


# -- nested fields ------------------------------------------------------------------------------------------------------


def _check_nested(fields: Mapping[str, Any], reader: Reader) -> None:
    """What is kept as it came has to be JSON: `GET /batch` hands it out, and MessagePack holds more than that."""
    for name, value in fields.items():
        try:
            orjson.dumps({name: value}, option=orjson.OPT_PASSTHROUGH_DATETIME)
        except TypeError as error:
            if "Recursion" in str(error):
                raise InvalidGroup(name, "a value", "must not be nested deeper than 250 levels") from None
            if reader == "msgpack":  # of JSON, only numbers and text that can't be packed, which pack tells
                raise InvalidGroup(name, "a value", f"must be what JSON can express ({error})") from None
        if reader != "strict json" and (found := non_finite(value, (name,))):
            raise InvalidGroup(path(found[0]), found[1], "must be finite")


def non_finite(value: object, location: Location = ()) -> tuple[Location, float] | None:
    """Where in a JSON value the first NaN or infinity is, and which."""
    if isinstance(value, float):
        return None if value - value == 0 else (location, value)
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return None
    for key, item in items:
        if found := non_finite(item, (*location, key)):
            return found
    return None


def broken_message(messages: Sequence[Sequence[dict[str, Any]]] | None) -> tuple[int, int, dict[str, Any]] | None:
    """Where the first message is that lacks what upstream asks of it, and which."""
    for row, conversation in enumerate(messages or ()):
        for column, message in enumerate(conversation):
            if "role" not in message or "content" not in message:
                return row, column, message
    return None


def path(location: Location) -> str:
    """`("scores", 1)` as `scores[1]`."""
    text = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in location)
    return text.removeprefix(".") or "body"

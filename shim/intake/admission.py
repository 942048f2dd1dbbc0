"""What the shim takes of a group, beyond what the broker admits: its size, and that it can be packed."""

from __future__ import annotations

import msgspec

from lachesis.broker import InvalidGroup
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import pack
from lachesis.shim.intake.large_bodies import Read

MAX_SEQUENCES = 8192  # of a group: each is looked at by itself


def pack_group(group: Group) -> bytes:
    """The packed form. Raises InvalidGroup for numbers and text that can't be packed."""
    try:
        return pack(group)
    except (OverflowError, UnicodeEncodeError):
        raise _unstorable(group) from None


def env_of(group: Group | ScoredGroup | Read) -> int | None:
    return group.env_id if isinstance(group, ScoredGroup) else group.env


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

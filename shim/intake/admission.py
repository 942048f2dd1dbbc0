"""Whether a posted group may become part of the run: what the broker admits, what its trainer takes, what can be packed."""

from __future__ import annotations

import msgspec

from lachesis.broker import InvalidGroup
from lachesis.broker.queue.admission import Reader, admit, check_fits
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import pack
from lachesis.broker.records.registrations import TrainerConfig

MAX_SEQUENCES = 8192  # of a group: each is looked at by itself


def admit_post(group: Group, trainer: TrainerConfig | None, reader: Reader | None, packed: bytes = b"") -> bytes:
    """The packed form of a group, `packed` where it has one. Raises InvalidGroup unless the run's trainer can train it.

    Without a `reader` it comes from a worker, which has admitted it but for the trainer's limits.
    """
    limits = {"max_token_len": trainer.max_token_len, "batch_size": trainer.batch_size} if trainer else {}
    if reader:
        admit(group, **limits, reader=reader)
    else:
        check_fits(group, **limits)
    return packed or pack_group(group)


def env_of(group: Group | ScoredGroup) -> int | None:
    return group.env_id if isinstance(group, ScoredGroup) else group.env


def pack_group(group: Group) -> bytes:
    """The packed form. Raises InvalidGroup for numbers and text that can't be packed."""
    try:
        return pack(group)
    except (OverflowError, UnicodeEncodeError):
        raise _unstorable(group) from None


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

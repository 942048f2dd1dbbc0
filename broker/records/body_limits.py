"""How much is in a body, before anything makes values of it.

A list of two bytes, `[]`, becomes an object of seventy, and native parsers keep counters of their own: simdjson's has 24
bits. So lists, objects and values are counted first, at a gigabyte a second, and what has too many is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lachesis.broker.errors import LachesisError

MAX_VALUES = 15_000_000  # of one body; simdjson counts the elements of a list up to 2^24 - 1
PIECE_BYTES = 1 << 20


class TooMany(LachesisError, ValueError):
    """A body with more in it than is read. Names the field, what is there and the rule."""

    def __init__(self, found: str, rule: str, field: str = "body") -> None:
        self.field, self.value, self.rule = field, found, rule
        super().__init__(f"{field} = {found}: {rule}")


class Counts(NamedTuple):
    """Of a body; `values` are those in lists and objects."""

    containers: int  # lists and objects
    values: int

    def check(self, max_containers: int, max_values: int = MAX_VALUES) -> None:
        """Raise TooMany."""
        if self.containers > max_containers:
            raise TooMany(f"{self.containers} lists and objects", f"must hold at most {max_containers}")
        if self.values > max_values:
            raise TooMany(f"{self.values} values", f"must hold at most {max_values}")


def check_json(body: bytes, max_containers: int, max_values: int = MAX_VALUES) -> None:
    """Raise TooMany unless a body of JSON holds at most so many lists and objects, and so many values.

    What only looks like more, because there are brackets and commas in text, passes.
    """
    if len(body) <= min(max_containers, max_values):
        return  # each takes a byte
    most = _count(body)
    if most.containers > max_containers or most.values > max_values:
        _count_outside_text(body).check(max_containers, max_values)


def _count(body: bytes) -> Counts:
    """Opening brackets, and commas besides, wherever they stand."""
    containers = commas = 0
    for start in range(0, len(body), PIECE_BYTES):
        piece = np.frombuffer(body, "u1", count=min(PIECE_BYTES, len(body) - start), offset=start)
        containers += int(np.count_nonzero(piece == ord("[")) + np.count_nonzero(piece == ord("{")))
        commas += int(np.count_nonzero(piece == ord(",")))
    return Counts(containers, containers + commas)


def _count_outside_text(body: bytes) -> Counts:
    containers = commas = start = 0
    outside = True
    while start < len(body):
        end = start + PIECE_BYTES
        while body[end - 1 : end] == b"\\":  # what it escapes belongs to it
            end += PIECE_BYTES
        piece = body[start:end].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        text = b"".join(parts[0 if outside else 1 :: 2])
        outside ^= len(parts) % 2 == 0
        containers += text.count(b"[") + text.count(b"{")
        commas += text.count(b",")
        start = end
    return Counts(containers, containers + commas)


def check_msgpack(body: bytes, max_containers: int, max_values: int = MAX_VALUES) -> None:
    """The same for MessagePack, of which it walks over every value. Of what is none nothing is said: its decoder does."""
    containers = values = place = 0
    end = len(body)
    while place < end:
        kind = body[place]
        values += 1
        place += 1
        if kind <= 0x7F or kind >= 0xE0:
            continue
        if kind <= 0x9F or kind >= 0xDC:
            containers += 1
            if containers > max_containers:
                break
            place += 0 if kind <= 0x9F else 2 if kind in (0xDC, 0xDE) else 4
        elif kind <= 0xBF:
            place += kind & 0x1F
        else:
            size, counted = _SIZES.get(kind, (0, 0))
            place += size + (int.from_bytes(body[place : place + counted], "big") if counted else 0)
        if values > max_values:
            break
    Counts(containers, values).check(max_containers, max_values)


_SIZES = {  # by a value's first byte: how many follow, and how many of those tell how many follow them
    0xC4: (1, 1), 0xC5: (2, 2), 0xC6: (4, 4), 0xC7: (2, 1), 0xC8: (3, 2), 0xC9: (5, 4), 0xCA: (4, 0), 0xCB: (8, 0),
    0xCC: (1, 0), 0xCD: (2, 0), 0xCE: (4, 0), 0xCF: (8, 0), 0xD0: (1, 0), 0xD1: (2, 0), 0xD2: (4, 0), 0xD3: (8, 0),
    0xD4: (2, 0), 0xD5: (3, 0), 0xD6: (5, 0), 0xD7: (9, 0), 0xD8: (17, 0), 0xD9: (1, 1), 0xDA: (2, 2), 0xDB: (4, 4),
}  # fmt: skip

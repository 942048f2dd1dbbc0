"""Small posts that would be large, or too many, inside."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import zstandard

from lachesis.broker.records.packing import PACKED_TYPE

MIB = 1 << 20
GZIP = {"Content-Encoding": "gzip"}
PACKED = {"Content-Type": PACKED_TYPE}
WHOLE = b'{"tokens":[[1]],"masks":[[1]],"scores":[1]'


def packed(gz: Iterator[bytes] | list[bytes]) -> bytes:
    squeeze = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join([squeeze.compress(part) for part in gz]) + squeeze.flush()


def filled(before: bytes, element: bytes, after: bytes, size: int) -> bytes:
    """Compressed JSON of so many bytes inside: a list of the same element again and again."""
    return packed([before, (element + b",") * (size // (len(element) + 1)), element, after])


def nested(rest: bytes, **fields: Any) -> bytes:
    """A packed group whose nested values are the MessagePack `rest`."""
    encode = msgspec.msgpack.encode
    row = ["<i4", np.array([2], "<i4").tobytes(), np.array([1, 2], "<i4").tobytes()]
    whole = {"env": None, "tokens": row, "masks": row, "scores": np.ones(1).tobytes(), **fields}
    body = bytes([0x80 + len(whole) + 1]) + b"".join(encode(k) + encode(v) for k, v in whole.items())
    return zstandard.compress(body + encode("rest") + rest)


def images(element: bytes, count: int) -> bytes:
    return b"\x81" + msgspec.msgpack.encode("images") + b"\xdd" + count.to_bytes(4, "big") + element * count


rows = ["<i4", np.ones(100_000, "<i4").tobytes(), np.ones(100_000, "<i4").tobytes()]


class Bomb(NamedTuple):
    path: str
    body: Callable[[], bytes]
    headers: dict[str, str]
    status: int  # of the answer
    words: str  # in it


BOMBS = {
    "empty lists": Bomb("/scored_data", lambda: filled(WHOLE + b',"images":[', b"[]", b"]}", 70 * MIB), GZIP, 413, "lists and objects: must hold at most 250000"),
    "rows of one": Bomb("/scored_data", lambda: filled(b'{"tokens":[', b"[1]", b'],"masks":[[1]],"scores":[1]}', 8 * MIB), GZIP, 413, "lists and objects"),
    "a list of nothing": Bomb("/scored_data_list", lambda: filled(b"[", b"{}", b"]", 8 * MIB), GZIP, 413, "lists and objects"),
    "a shorter list of nothing": Bomb("/scored_data_list", lambda: filled(b"[", b"{}", b"]", MIB // 2), GZIP, 422, "[0].tokens: Field required"),
    "numbers of the wrong type": Bomb("/scored_data", lambda: filled(b'{"masks":[[1]],"scores":[1],"tokens":[[', b"null", b"]]}", 4 * MIB), GZIP, 422, "tokens[0][0] = None"),
    "more values than are read": Bomb("/scored_data", lambda: filled(b'{"masks":[[1]],"scores":[1],"tokens":[[', b"1", b"]]}", 32 * MIB), GZIP, 413, "values: must hold at most 15000000"),
    "short texts": Bomb("/scored_data", lambda: filled(WHOLE + b',"images":[', b'"ab"', b"]}", 24 * MIB), GZIP, 413, "times as much memory"),
    "a wrong number of megabytes": Bomb("/register-env", lambda: filled(b'{"max_token_length":[', b"[]", b"]}", 8 * MIB), GZIP, 413, "of this route"),
    "an unknown key of megabytes": Bomb("/disconnect-env", lambda: filled(b'{"env_id":0,"x":[', b"{}", b"]}", 8 * MIB), GZIP, 413, "of this route"),
    "packed lists": Bomb("/scored_data", lambda: nested(images(b"\x90", 8 * MIB)), PACKED, 413, "lists and objects"),
    "packed maps, fewer": Bomb("/scored_data", lambda: nested(images(b"\x80", 300_000)), PACKED, 413, "lists and objects"),
    "packed rows": Bomb("/scored_data", lambda: nested(b"\x80", tokens=rows, masks=rows), PACKED, 422, "tokens = '100000 sequences': must hold at most 8192"),
    "packed spans": Bomb("/scored_data", lambda: nested(b"\x80", weight_versions=[[[0, 0, 1]] * 30_000]), PACKED, 422, "must hold at most 20000"),
}  # fmt: skip

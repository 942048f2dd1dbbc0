"""How many lists a MessagePack value holds, known without decoding it: an empty one is a byte there, and 56 in memory."""

from __future__ import annotations

_FIXED = {0xC0: 0, 0xC1: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2}
_FIXED |= {0xD2: 4, 0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}  # bytes that follow a value's first one
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}  # bytes of a text's length
_NESTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # bytes of the count, values for each


def holds_more_lists(data: bytes, most: int) -> bool:
    """Whether the value has more than `most` lists and maps. What is no MessagePack is for the decoder to refuse."""
    place, left, found, end = 0, 1, 0, len(data)
    while left and place < end:
        left -= 1
        first = data[place]
        place += 1
        if first < 0x80 or first >= 0xE0:
            continue
        if first < 0xA0:
            left += (first & 15) * (1 if first >= 0x90 else 2)
        elif first < 0xC0:
            place += first & 31
            continue
        elif first in _FIXED:
            place += _FIXED[first]
            continue
        elif first in _SIZED:
            width = _SIZED[first]
            place += width + int.from_bytes(data[place : place + width], "big") + (0xC7 <= first <= 0xC9)
            continue
        else:
            width, each = _NESTED[first]
            left += each * int.from_bytes(data[place : place + width], "big")
            place += width
        found += 1
        if found > most:
            return True
    return False

"""Groups survive the way to bytes and back; what is not a packed group is refused in words."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import group, numbers, scored_groups

from lachesis.broker import InvalidGroup
from lachesis.broker.queue.admission import check_group
from lachesis.broker.records.blobs import from_blob, to_blob
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.packing import pack, to_arrays, to_scored, unpack, unpacked_bytes


@given(scored_groups(), st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_valid_group_survives(scored: ScoredGroup, v_min: int, v_max: int) -> None:
    check_group(to_arrays(scored))
    packed = pack(scored)
    stored = from_blob(to_blob(packed, "g", v_min=v_min, v_max=v_max))
    assert (stored.gid, stored.v_min, stored.v_max) == ("g", v_min, v_max)
    assert to_scored(stored) == scored
    assert pack(stored) == pack(to_arrays(scored)) == packed


def test_what_is_known_of_the_making_is_kept_beside_what_was_posted() -> None:
    packed, sampled = pack(group(1)), [np.array([1.0, -0.5, -0.25], "<f4")] * 2
    versions = [((3, 1, 2), (4, 2, 3)), ()]
    stored = from_blob(to_blob(packed, "g", v_min=3, v_max=4, versions=versions, sampled_logprobs=sampled))
    assert stored.versions == versions
    assert stored.sampled_logprobs is not None
    assert [row.tolist() for row in stored.sampled_logprobs] == [row.tolist() for row in sampled]
    before = msgspec.msgpack.encode(["g", 3, 4, packed])  # a blob as it was stored before there was any of this
    assert (from_blob(before).v_max, from_blob(before).versions, from_blob(before).sampled_logprobs) == (4, None, None)


small = st.one_of(st.integers(-2, 3), st.sampled_from((-100, 2**31 - 1, -(2**31), 2**31)))


@given(st.lists(st.tuples(small.filter(lambda token: token >= 0), small), min_size=1, max_size=9))
def test_any_mask_survives(pairs: list[tuple[int, int]]) -> None:
    """Also where masks are close to tokens, and to the -1 that stands for the token in the packed form."""
    scored = ScoredGroup(tokens=[[t for t, _ in pairs]], masks=[[m for _, m in pairs]], scores=[0.0])
    assert to_scored(unpack(pack(scored))) == scored


def test_the_usual_mask_costs_almost_nothing() -> None:
    tokens = [np.random.default_rng(row).integers(0, 128_000, 2048).tolist() for row in range(8)]
    masks = [[-100] * 512 + row[512:] for row in tokens]
    usual = ScoredGroup(tokens=tokens, masks=masks, scores=[0.0] * 8)
    without = ScoredGroup(tokens=tokens, masks=[[0] * 2048] * 8, scores=[0.0] * 8)
    assert len(pack(usual)) < 1.02 * len(pack(without))


@given(st.lists(numbers, min_size=1, max_size=8))
def test_logprobs_take_four_bytes_exactly_where_nothing_is_lost(row: list[float]) -> None:
    scored = ScoredGroup(tokens=[[1] * len(row)], masks=[[1] * len(row)], scores=[0.0], inference_logprobs=[row])
    stored = unpack(pack(scored))
    assert stored.inference_logprobs is not None
    with np.errstate(over="ignore"):
        lossless = all(float(np.float32(value)) == value for value in row)
    assert stored.inference_logprobs[0].dtype == (np.float32 if lossless else np.float64)


def test_integers_take_four_bytes_where_all_fit() -> None:
    narrow, wide = (
        unpack(pack(ScoredGroup(tokens=[[1, top]], masks=[[-100, 1]], scores=[0.0]))) for top in (2**31 - 1, 2**31)
    )
    assert (narrow.tokens[0].dtype, wide.tokens[0].dtype) == (np.int32, np.int64)
    assert wide.masks[0].dtype == np.int32


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_an_integer_beyond_64_bits_is_named(number: int) -> None:
    with pytest.raises(InvalidGroup, match=r"masks = -?\d+: must fit"):
        pack(ScoredGroup(tokens=[[1]], masks=[[number]], scores=[0.0]))


def test_empty_is_not_absent() -> None:
    scored = group(1)
    scored.advantages, scored.messages, scored.group_overrides, scored.overrides = [], [], {}, []
    back = to_scored(unpack(pack(scored)))
    assert (back.advantages, back.messages, back.group_overrides, back.overrides) == ([], [], {}, [])
    assert back.ref_logprobs is None
    assert back.generation_params is None


def _spoil(**changes: Any) -> bytes:
    """A packed group with some of its MessagePack replaced."""
    content = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(pack(group(1))))
    return zstandard.ZstdCompressor().compress(msgspec.msgpack.encode({**content, **changes}))


INTS = np.arange(6, dtype="<i4").tobytes()
THREE_THREE = np.array([3, 3], "<i4").tobytes()
SPOILT = {
    "empty": b"",
    "not zstd": b"{}",
    "cut": pack(group(1))[:-1],
    "more behind it": pack(group(1)) + b"x",
    "no size": zstandard.ZstdCompressor(write_content_size=False).compress(b"x"),
    "a skippable frame": b"\x50\x2a\x4d\x18\x01\x00\x00\x00x",
    "not msgpack": zstandard.ZstdCompressor().compress(b"\xc1"),
    "nested too deeply": zstandard.ZstdCompressor().compress(b"\x91" * 100_000),
    "keys too few": zstandard.ZstdCompressor().compress(msgspec.msgpack.encode({"env": 1})),
    "another type": _spoil(env="x"),
    "floats for tokens": _spoil(tokens=["<f4", THREE_THREE, INTS]),
    "objects for tokens": _spoil(tokens=["O", THREE_THREE, INTS]),
    "half a number": _spoil(tokens=["<i4", THREE_THREE, INTS[:-1]]),
    "a value too few": _spoil(tokens=["<i4", THREE_THREE, INTS[:-4]]),
    "a negative length": _spoil(tokens=["<i4", np.array([7, -1], "<i4").tobytes(), INTS]),
    "half a length": _spoil(tokens=["<i4", THREE_THREE[:-1], INTS]),
    "half a score": _spoil(scores=b"1234567"),
    "text for messages": _spoil(rest={"messages": "x"}),
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
def test_what_is_not_a_packed_group_is_refused(spoilt: bytes) -> None:
    with pytest.raises(InvalidGroup, match="body = 'bytes': must be "):
        unpack(spoilt)


@given(st.binary(max_size=50), st.data())
def test_no_bytes_raise_anything_else(junk: bytes, data: st.DataObject) -> None:
    content = zstandard.ZstdDecompressor().decompress(pack(group(1)))
    place = data.draw(st.integers(0, len(content) - 1))
    spoilt = zstandard.ZstdCompressor().compress(content[:place] + junk + content[place + len(junk) :])
    for body in (junk, spoilt):
        try:
            check_group(unpack(body))
        except InvalidGroup:
            continue


def test_rows_of_other_lengths_are_for_validation_to_refuse() -> None:
    masks = _spoil(masks=["<i4", np.array([2, 3], "<i4").tobytes(), INTS[:20]])
    with pytest.raises(InvalidGroup, match=r"masks\[0\] = '2 values'"):
        check_group(unpack(masks))


def test_a_bomb_says_how_large_it_is() -> None:
    assert unpacked_bytes(zstandard.ZstdCompressor().compress(bytes(100 << 20))) == 100 << 20

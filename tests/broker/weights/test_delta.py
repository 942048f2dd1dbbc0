"""Deltas of weight files are exact to the bit, small where little changed, and refused where anything else is at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lachesis.broker import WeightsRefused
from lachesis.broker.records.versions import Delta, FileInfo
from lachesis.broker.weights import delta
from lachesis.broker.weights.delta import apply_delta, write_delta

HEADER = b"\x08" + bytes(7) + b"{}      "
SPECIAL = {  # little endian: quiet and signalling NaNs with payloads, -0.0, infinity, the smallest subnormal
    1: [0x7F, 0xFF, 0x80],
    2: [0x7FC1, 0xFF81, 0x8000, 0x7F80, 0x0001],
    4: [0x7FC00001, 0xFF800001, 0x80000000, 0x7F800000, 0x00000001],
    8: [0x7FF8000000000001, 0xFFF0000000000001, 1 << 63, 0x7FF0000000000000, 1],
}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, bytes, bytes]:
    """(width, a file, another one of its size): elements changed sparsely, or all of them, to any bits."""
    width = draw(st.sampled_from(sorted(SPECIAL)))
    count = draw(st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = rng.integers(0, 256, (count, width), dtype=np.uint8)
    new = old.copy()
    changed = rng.random(count) < draw(st.sampled_from([0.0, 0.05, 1.0]))
    new[changed] = rng.integers(0, 256, (int(changed.sum()), width), dtype=np.uint8)
    for array in (old, new):
        for value in draw(st.lists(st.sampled_from(SPECIAL[width]), max_size=5)):
            if count:
                array[rng.integers(count)] = np.frombuffer(value.to_bytes(width, "little"), np.uint8)
    tail = draw(st.binary(max_size=width - 1))
    return width, HEADER + old.tobytes() + tail, HEADER + new.tobytes() + tail[::-1]


def stored(folder: Path, **contents: bytes) -> tuple[Path, ...]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return tuple(folder / name for name in contents)


@given(pair=pairs(), pieces=st.sampled_from([64, 1 << 20]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bits_come_back_and_never_from_more_bytes(
    tmp_path: Path, pair: tuple[int, bytes, bytes], pieces: int
) -> None:
    width, old, new = pair
    base, fresh = stored(tmp_path, old=old, new=new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "PIECE", pieces)
        told = write_delta(base, fresh, tmp_path / "delta", width=width)
        if told is None:
            assert not (tmp_path / "delta").exists()
            return
        apply_delta(base, tmp_path / "delta", tmp_path / "again", told)
    assert (tmp_path / "again").read_bytes() == new
    assert told.file.bytes == (tmp_path / "delta").stat().st_size < len(new)
    (tmp_path / "delta").unlink()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Delta, bytes]:
    """(base, delta, what is told of it, what it gives); 1 of 100 elements differs."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 1 << 16, 50_000, dtype=np.uint16)
    new = old.copy()
    new[::100] ^= 1
    base, fresh = stored(tmp_path, base=old.tobytes(), fresh=new.tobytes())
    told = write_delta(base, fresh, tmp_path / "delta", width=2)
    assert told is not None
    return base, tmp_path / "delta", told, new.tobytes()


def test_what_did_not_change_costs_next_to_nothing(made: tuple[Path, Path, Delta, bytes]) -> None:
    _, _, told, new = made
    assert told.file.bytes < len(new) / 50


def test_files_of_other_sizes_and_noise_have_no_delta(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 4096), dtype=np.uint8)
    one, other, longer = stored(tmp_path, a=noise[0].tobytes(), b=noise[1].tobytes(), c=noise.tobytes())
    assert write_delta(one, other, tmp_path / "delta", width=2) is None
    assert write_delta(one, longer, tmp_path / "delta", width=2) is None
    assert not (tmp_path / "delta").exists()


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


SPOILED: list[tuple[Callable[[Path, Path], object], str]] = [
    (lambda base, _: flip(base), "the SHA-256 of the base base differs"),
    (
        lambda base, _: base.write_bytes(base.read_bytes()[:-1]),
        "the base base has 99999 bytes, the manifest says 100000",
    ),
    (lambda _, delta: flip(delta), "the SHA-256 of the delta delta differs"),
    (lambda _, delta: delta.write_bytes(b""), "the delta delta has 0 bytes"),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
def test_another_base_and_another_delta_are_refused(
    made: tuple[Path, Path, Delta, bytes], tmp_path: Path, spoil: Callable[[Path, Path], object], reason: str
) -> None:
    base, packed, told, _ = made
    spoil(base, packed)
    with pytest.raises(WeightsRefused, match=reason):
        apply_delta(base, packed, tmp_path / "again", told)
    assert not (tmp_path / "again").exists()


def test_a_missing_base_or_delta_is_said_as_such(made: tuple[Path, Path, Delta, bytes], tmp_path: Path) -> None:
    base, packed, told, _ = made
    with pytest.raises(FileNotFoundError):
        apply_delta(tmp_path / "no", packed, tmp_path / "again", told)
    with pytest.raises(FileNotFoundError):
        apply_delta(base, tmp_path / "no", tmp_path / "again", told)
    assert not (tmp_path / "again").exists()


LYING: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda raw: b"no zstd" + raw, "can't be decompressed"),
    (lambda raw: raw[: len(raw) // 2], "ends before its base does"),
]


@pytest.mark.parametrize(("spoil", "reason"), LYING)
def test_a_delta_that_was_published_broken_is_refused(
    made: tuple[Path, Path, Delta, bytes], tmp_path: Path, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    base, packed, told, _ = made
    packed.write_bytes(spoil(packed.read_bytes()))
    info = FileInfo(bytes=packed.stat().st_size, sha256=hashlib.sha256(packed.read_bytes()).hexdigest())
    with pytest.raises(WeightsRefused, match=reason):
        apply_delta(base, packed, tmp_path / "again", msgspec.structs.replace(told, file=info))
    assert not (tmp_path / "again").exists()


def test_a_delta_that_gives_another_file_is_refused(made: tuple[Path, Path, Delta, bytes], tmp_path: Path) -> None:
    base, packed, told, _ = made
    with pytest.raises(WeightsRefused, match="gives another file than was published"):
        apply_delta(base, packed, tmp_path / "again", msgspec.structs.replace(told, width=4))
    assert not (tmp_path / "again").exists()

"""Segments: what is written is read, and nothing else is ever read."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import trained

from lachesis.broker.archive.segments import Archive, Archived, Header
from lachesis.broker.errors import ArchiveUnreadable, ConfigurationError
from lachesis.broker.records.steps import BatchEntry

HEADER = Header("r", "c", 1.0)
folders = itertools.count()


def batch(step: int, blobs: list[bytes]) -> Archived:
    gids = tuple(f"g{step}.{index}" for index in range(len(blobs)))
    entry = BatchEntry(step=step, gids=gids, n=2, tok=6, v_min=0, v_max=step, formed_at=1.5, bytes=sum(map(len, blobs)))
    return Archived(entry, trained(entry), blobs, "c")


def steps(archive: Archive, *bounds: int) -> tuple[list[int], list[str]]:
    notes: list[str] = []
    return [archived.batch.step for archived in archive.read(*bounds, note=notes.append)], notes


def two(folder: Path) -> tuple[Archive, Path]:
    """Steps 1 to 5 in two segments; the path of the first."""
    archive = Archive(str(folder))
    archive.prepare()
    first = archive.write(HEADER, [batch(step, [b"a" * step, b""]) for step in (1, 2, 3)])
    archive.write(HEADER, [batch(step, [b"b"]) for step in (4, 5)])
    return archive, Path(first.path)


@given(
    segments=st.lists(
        st.lists(st.lists(st.binary(max_size=40), max_size=3), min_size=1, max_size=3),
        max_size=4,
    ),
    scheme=st.sampled_from(("memory", "file")),
)
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read(
    segments: list[list[list[bytes]]], scheme: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = f"/archive{next(folders)}" if scheme == "memory" else str(tmp_path_factory.mktemp("archive"))
    archive = Archive(f"{scheme}://{folder}")
    archive.prepare()
    written: list[Archived] = []
    for content in segments:
        batches = [batch(len(written) + n, blobs) for n, blobs in enumerate(content, 1)]
        archive.write(HEADER, batches)
        written += batches
    assert [archived._replace(segment="") for archived in archive.read(note=pytest.fail)] == written
    assert archive.newest() == ((HEADER, written[-1].batch) if written else None)


def test_a_range_is_read(tmp_path: Path) -> None:
    archive, _ = two(tmp_path)
    assert steps(archive, 2, 4) == ([2, 3, 4], [])
    assert steps(archive, 4) == ([4, 5], [])
    assert steps(archive, 9) == ([], [])


def test_a_step_that_stands_twice_is_read_once(tmp_path: Path) -> None:
    archive, _ = two(tmp_path)
    archive.write(HEADER, [batch(4, [b"b"])])
    archive.write(HEADER, [batch(step, [b"b"]) for step in (4, 5, 6)])
    assert steps(archive) == ([1, 2, 3, 4, 5, 6], [])


def test_missing_steps_are_named(tmp_path: Path) -> None:
    archive, _ = two(tmp_path)
    archive.write(HEADER, [batch(9, [b"c"])])
    assert steps(archive) == ([1, 2, 3, 4, 5, 9], ["the archive does not hold steps 6 to 8"])


def test_a_segment_cut_off_anywhere_gives_its_whole_batches_and_says_so(tmp_path: Path) -> None:
    archive, path = two(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found, notes = steps(archive)
        assert found in ([4, 5], [1, 4, 5], [1, 2, 4, 5], [1, 2, 3, 4, 5])
        assert f"{path} is cut off: its writer was killed" in notes
        assert len(notes) == 1 + (1 < len(found) < 5 and found[0] == 1)
    assert steps(archive)[0] == [1, 2, 3, 4, 5]  # only the end was missing


def test_the_newest_segment_counts_only_if_it_is_whole(tmp_path: Path) -> None:
    archive, _ = two(tmp_path)
    last = Path(archive.segments()[-1].path)
    last.write_bytes(last.read_bytes()[:-1])
    newest = archive.newest()
    assert newest is not None
    assert newest[1].step == 3


def test_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    archive, path = two(tmp_path)
    whole, said = path.read_bytes(), set()
    sound = {archived.batch.step: archived for archived in archive.read(note=pytest.fail)}
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        notes: list[str] = []
        try:
            for archived in archive.read(note=notes.append):
                assert archived == sound[archived.batch.step]
        except ArchiveUnreadable as error:
            said.add("damaged" if "is damaged before byte" in str(error) else "foreign")
        else:  # a length that points behind the end
            assert notes
            said.add("cut off")
    assert said == {"damaged", "foreign", "cut off"}


def test_a_killed_writers_unfinished_file_is_not_seen_and_cleared_away(tmp_path: Path) -> None:
    archive, path = two(tmp_path)
    left = tmp_path / "0000000006-0000000009.lachesis.part"
    left.write_bytes(path.read_bytes())
    assert steps(archive) == ([1, 2, 3, 4, 5], [])
    archive.prepare()
    assert not left.exists()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense://somewhere", "nonsense"),
        ("s3://bucket/path", "s3fs"),  # known to fsspec, not installed
        ("/proc/none", "can't write there"),
        ("/dev/null", "can't write there"),
    ],
)
def test_a_place_that_can_not_be_used_is_one_clear_line(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Archive(url).prepare()

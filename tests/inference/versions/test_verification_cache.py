"""The agents of a machine read a version's contents once between them, and again when the files are not the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lachesis.broker import WeightsRefused
from lachesis.inference.versions.verification_cache import KEEP_RECORDS, TICK_S, VerificationCache

SPAWN = multiprocessing.get_context("spawn")  # the forkserver has imported verl, or will


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in found:
        path.write_bytes(b"weights of " + path.name.encode())
    time.sleep(2 * TICK_S)
    return found


class Checks:
    """Counts them."""

    def __init__(self, verified: VerificationCache, files: list[Path]) -> None:
        self.verified, self.files, self.count = verified, files, 0

    def __call__(self, manifest_sha256: str = "m") -> int:
        """How many checks this one call made."""
        before = self.count
        self.verified.check_once(manifest_sha256, self.files, self._check)
        return self.count - before

    def _check(self) -> None:
        self.count += 1


def rewrite(path: Path) -> None:
    """In place, to the same size, and the time of its content set back."""
    was = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def replace(path: Path) -> None:
    was = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    other.rename(path)


def tear(path: Path) -> None:
    os.truncate(path, 3)


@pytest.mark.parametrize("change", [rewrite, replace, tear, Path.touch])
def test_files_are_read_again_once_they_are_not_the_same(
    files: list[Path], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    checks = Checks(VerificationCache(tmp_path / "verified"), files)
    assert [checks(), checks(), checks("another manifest"), checks()] == [1, 0, 1, 0]
    assert Checks(VerificationCache(tmp_path / "verified"), files)() == 0  # another agent
    change(files[1])
    assert checks() == 1


def test_what_was_written_a_moment_ago_is_not_recorded(files: list[Path], tmp_path: Path) -> None:
    checks = Checks(VerificationCache(tmp_path / "verified"), files)
    files[0].touch()
    assert [checks(), checks()] == [1, 1]


def test_a_refusal_and_a_change_meanwhile_are_not_recorded(files: list[Path], tmp_path: Path) -> None:
    verified = VerificationCache(tmp_path / "verified")

    def refuse() -> None:
        raise WeightsRefused("not finite")

    for _ in range(2):
        with pytest.raises(WeightsRefused, match="not finite"):
            verified.check_once("m", files, refuse)
    verified.check_once("m", files, files[0].touch)
    assert Checks(verified, files)() == 1


def test_a_torn_record_counts_for_nothing_and_old_ones_go(files: list[Path], tmp_path: Path) -> None:
    checks = Checks(VerificationCache(tmp_path / "verified"), files)
    assert checks() == 1
    os.truncate(tmp_path / "verified" / "m", 10)
    assert [checks(), checks()] == [1, 0]
    for number in range(KEEP_RECORDS + 3):
        checks(f"m{number}")
    assert len(list((tmp_path / "verified").iterdir())) == KEEP_RECORDS


def check_slowly(folder: Path, files: list[Path], read: Path, for_s: float) -> None:
    def check() -> None:
        (read / str(os.getpid())).touch()
        time.sleep(for_s)

    VerificationCache(folder).check_once("m", files, check)


def started(tmp_path: Path, files: list[Path], count: int, for_s: float) -> list[multiprocessing.process.BaseProcess]:
    (tmp_path / "read").mkdir(exist_ok=True)
    found: list[multiprocessing.process.BaseProcess] = []
    for _ in range(count):
        process = SPAWN.Process(target=check_slowly, args=(tmp_path / "verified", files, tmp_path / "read", for_s))
        process.start()
        found.append(process)
    return found


def readers(tmp_path: Path) -> list[int]:
    return [int(path.name) for path in (tmp_path / "read").iterdir()]


def test_of_agents_that_come_together_one_reads(files: list[Path], tmp_path: Path) -> None:
    agents = started(tmp_path, files, 4, for_s=0.5)
    for agent in agents:
        agent.join()
    assert [agent.exitcode for agent in agents] == [0] * 4
    assert len(readers(tmp_path)) == 1


def test_when_the_one_that_reads_is_killed_another_does(files: list[Path], tmp_path: Path) -> None:
    (first,) = started(tmp_path, files, 1, for_s=600)
    while readers(tmp_path) != [first.pid]:
        time.sleep(0.01)
    (second,) = started(tmp_path, files, 1, for_s=0)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second.join()
    assert second.exitcode == 0
    assert set(readers(tmp_path)) == {first.pid, second.pid}


def test_one_that_is_stopped_holds_nobody_up(files: list[Path], tmp_path: Path) -> None:
    (first,) = started(tmp_path, files, 1, for_s=600)
    while readers(tmp_path) != [first.pid]:
        time.sleep(0.01)
    assert Checks(VerificationCache(tmp_path / "verified", patience_s=0.1), files)() == 1
    first.kill()

"""Each deliberate difference from upstream is real, and is documented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from differences import DIFFERENCES, Difference
from side_by_side import Both, side_by_side

from lachesis.broker import EmbeddedRedis

PAGE = Path(__file__).parents[2] / "docs" / "atropos-compatibility.md"


@pytest.fixture(scope="module")
def pair(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with side_by_side(shared_redis.url, "differences", tmp_path_factory.mktemp("shim") / "log") as both:
        yield both


@pytest.fixture
def both(pair: Both) -> Both:
    """Both servers with a trainer registered and started, and nothing else."""
    pair.get("/reset_data")
    pair.register()
    assert pair.batch() is None
    return pair


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
def test_it_differs(both: Both, difference: Difference) -> None:
    difference.show(both)


def test_each_stands_in_the_documentation_with_its_reason() -> None:
    text = PAGE.read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    documented = {(row[0], row[-1]) for row in rows if len(row) == 3}
    assert {(each.name, each.reason) for each in DIFFERENCES.values()} <= documented

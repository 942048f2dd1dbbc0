"""Unmodified environments of atroposlib while versions are published: the benchmark, in short."""

from __future__ import annotations

from pathlib import Path

import pytest
from lineage import Rig, Row, rig
from rollouts import TURNS

pytestmark = [pytest.mark.anyio, pytest.mark.sglang, pytest.mark.timeout(900)]


async def test_every_sequence_is_joined_with_the_versions_that_made_it(tmp_path: Path) -> None:
    async with rig(tmp_path) as whole:
        single = await _mixed(whole, "single", "vllm", 200)
        turns = await _mixed(whole, "turns", "sglang", 100)
    assert single.turns == 1
    assert turns.turns == TURNS


async def _mixed(whole: Rig, kind: str, server_type: str, sequences: int) -> Row:
    """What was posted until some sequence was made by several versions; all that comes before must be right, too."""
    while True:  # an update comes in the middle of a sequence or not; pytest's limit ends it where none ever does
        row = await whole.measure(kind, server_type, sequences, print)
        assert row.good, row
        if row.mixed:
            assert row.versions > 1
            return row

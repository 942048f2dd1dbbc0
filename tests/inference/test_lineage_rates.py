"""Unmodified environments of atroposlib while versions are published: the benchmark, in short."""

from __future__ import annotations

from pathlib import Path

import pytest
from lineage import rig
from rollouts import TURNS

pytestmark = [pytest.mark.anyio, pytest.mark.sglang]


async def test_every_sequence_is_joined_with_the_versions_that_made_it(tmp_path: Path) -> None:
    async with rig(tmp_path) as whole:
        single = await whole.measure("single", "vllm", 200, print)
        turns = await whole.measure("turns", "sglang", 100, print)
    for row in (single, turns):
        assert row.good, row
        assert row.versions > 1
        assert row.mixed > 0
    assert single.turns == 1
    assert turns.turns == TURNS

"""The scripts as they are sent: whole, and fit to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lachesis.broker import Broker
from lachesis.broker.store.scripts import FILES

SCRIPTS = sorted((Path(__file__).parents[3] / "broker").rglob("*.lua"))


@pytest.mark.anyio
async def test_every_include_is_in_its_place_and_once(broker: Broker) -> None:
    for name in FILES:
        text = getattr(broker.scripts, name).script
        assert "@include" not in text, name
        functions = [line for line in text.splitlines() if line.startswith("local function ")]
        assert len(functions) == len(set(functions)), name
        await broker.redis.script_load(text)  # which compiles it


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_line_is_longer_than_a_window_is_wide(path: Path) -> None:
    assert max(map(len, path.read_text().splitlines())) <= 100

"""A command that Redis refuses says so in one line."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from sick_redis import sick_redis

from lachesis.broker import Broker
from lachesis.cli.main import main

pytestmark = pytest.mark.anyio

COMMANDS = (
    ("token", "create", "--role", "admin"),
    ("retention", "--keep-bytes", "1"),
    ("archive", "--stop"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_a_command_says_in_one_line_what_redis_refuses(
    tmp_path: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    async with sick_redis(tmp_path, user=True) as (url, sick):
        broker = await Broker.connect(url)
        await broker.enlist()
        await broker.aclose()
        async with sick("NOPERM"):
            assert await anyio.to_thread.run_sync(main, [*command, "--redis-url", url]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"lachesis {command[0]}: Redis refuses commands: its user may not do this")
    assert said.count("\n") == 1

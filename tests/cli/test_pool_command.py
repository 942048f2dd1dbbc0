"""`lachesis pool`: what a person does with it, on a real Redis."""

from __future__ import annotations

import json
from pathlib import Path

import anyio.to_thread
import pytest
from commands import lachesis

from lachesis.broker import Broker
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry
from lachesis.broker.weights.pools import NONE
from lachesis.cli.main import main

pytestmark = pytest.mark.anyio


@pytest.fixture
async def where(broker: Broker) -> tuple[str, ...]:
    """A run with versions 3, 4 and 5, and a server."""
    for version in (3, 4, 5):
        await broker.weights.publish("main", WeightsEntry(version, version, "/v", "0", 1, "BF16", version - 1))
    await broker.registry.report(ServerStatus("s0", "main", "http://s0", "ready", 5, -1, 0.0, checksum="abcdef"))
    return ("--redis-url", broker.url, "--run", broker.keys.run)


async def test_a_canary_is_promoted_or_rolled_back(broker: Broker, where: tuple[str, ...]) -> None:
    assert lachesis("pool", "pin", "4", *where).stdout.startswith("pool main: pinned to version 4 (")
    said = lachesis("pool", "canary", "5", "--share", "0.3", *where).stdout
    assert said == "pool main: version 5 on 30% of the servers, version 4 on the rest\n"
    lachesis("pool", "canary", "3", *where)  # another canary, the rest stays
    rule = json.loads(lachesis("pool", "list", "--json", *where).stdout)[0]["rule"]
    assert rule == {"mode": "canary", "version": 3, "rest": 4, "share": 0.25}
    assert lachesis("pool", "rollback", *where).stdout.startswith("pool main: pinned to version 4 (")
    lachesis("pool", "canary", "5", *where)
    assert lachesis("pool", "promote", *where).stdout.startswith("pool main: pinned to version 5 (")
    assert lachesis("pool", "newest", *where).stdout == "pool main: follows the newest version\n"

    modes = [fields[b"mode"] for _, fields in await broker.redis.xrange(broker.keys.rule("main"))]
    assert modes == [b"pin", b"canary", b"canary", b"pin", b"canary", b"pin", b"newest"]


async def test_a_canary_of_a_pool_that_follows_the_newest(broker: Broker, where: tuple[str, ...]) -> None:
    assert "version 3 on 25% of the servers, version 5 on the rest" in lachesis("pool", "canary", "3", *where).stdout
    lachesis("pool", "newest", *where)
    assert "version 5 on 25% of the servers, version 4 on the rest" in lachesis("pool", "canary", "5", *where).stdout


async def test_the_list_shows_what_is_served(where: tuple[str, ...]) -> None:
    lines = lachesis("pool", "list", *where).stdout.splitlines()
    assert lines[0] == "pool main: follows the newest version"
    assert lines[1].split() == ["s0", "silent", "newest", "version", "5", "abcdef"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pin", "9"], "version = 9: policy 'main' has not published it; its newest is 5"),
        (["pin", "-1"], "VERSION = '-1'"),
        (["canary", "4", "--share", "1"], "--share = '1'"),
        (["promote"], "pool 'main' has no canary to promote or roll back: follows the newest version"),
        (["rollback"], "pool 'main' has no canary"),
        (["pin", "4", "--pool", "a b"], "pool = 'a b'"),
        (["launch"], "no such action: 'launch'"),
    ],
)
async def test_what_makes_no_sense_is_refused(where: tuple[str, ...], arguments: list[str], says: str) -> None:
    done = lachesis("pool", *arguments, *where)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.fixture
async def kept(broker: Broker, tmp_path: Path) -> tuple[str, ...]:
    """A run with versions 0 to 9, of which the files of 7 to 9 are left."""
    for version in range(10):
        folder = tmp_path / f"v{version:06d}"
        await broker.weights.publish("main", WeightsEntry(version, version, str(folder), "0", 1, "BF16", version - 1))
        if version > 6:
            folder.mkdir()
    return ("--redis-url", broker.url, "--run", broker.keys.run)


@pytest.mark.parametrize("action", [("pin", "4"), ("canary", "4"), ("rollback",), ("promote",)])
async def test_a_version_whose_files_are_gone_is_refused_and_those_there_are_named(
    broker: Broker, kept: tuple[str, ...], action: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if action[0] in ("rollback", "promote"):  # they went while the canary was out
        version, rest = (4, 8) if action[0] == "promote" else (8, 4)
        assert await broker.pools.set_rule("main", PoolRule("canary", version, rest, 0.5), NONE)
    before = await broker.pools.rule("main")
    assert await anyio.to_thread.run_sync(main, ["pool", *action, *kept]) == 2
    told = capsys.readouterr().err
    assert "version = 4: its files are gone; there are 0, 7 to 9 (0 is the base model)" in told
    assert await broker.pools.rule("main") == before


async def test_a_version_that_is_there_and_the_base_model_can_be_pinned(broker: Broker, kept: tuple[str, ...]) -> None:
    for version in (8, 0):  # servers have the base model from their --model
        assert await anyio.to_thread.run_sync(main, ["pool", "pin", str(version), *kept]) == 0
        assert (await broker.pools.rule("main"))[1] == PoolRule("pin", version)


async def test_files_that_cannot_be_seen_from_here_are_left_to_the_servers(where: tuple[str, ...]) -> None:
    assert await anyio.to_thread.run_sync(main, ["pool", "pin", "4", *where]) == 0

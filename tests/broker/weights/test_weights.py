"""Versions are published once, in order, and followers get the newest."""

from __future__ import annotations

import asyncio

import pytest

from lachesis.broker import Broker, Conflict
from lachesis.broker.records.versions import WeightsEntry

pytestmark = pytest.mark.anyio


def entry(version: int) -> WeightsEntry:
    return WeightsEntry(
        version=version, step=version, uri=f"file:///v{version}", manifest_sha256="0", bytes=1, dtype="BF16", parent=version - 1
    )  # fmt: skip


async def test_a_version_is_published_once_and_never_after_a_newer_one(broker: Broker) -> None:
    assert await broker.weights.publish("main", entry(0))
    assert await broker.weights.publish("main", entry(2))
    assert not await broker.weights.publish("main", entry(2))
    with pytest.raises(Conflict, match="version 1 of policy 'main' can't be published after version 2"):
        await broker.weights.publish("main", entry(1))
    assert await broker.weights.newest("main") == entry(2)
    assert await broker.weights.get("main", 1) is None
    assert await broker.weights.newest("shadow") is None


async def test_what_is_published_while_a_follower_looks_is_not_missed(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = broker.weights.newest

    async def published_meanwhile(policy: str) -> WeightsEntry | None:
        found = await look(policy)
        if found is None:
            await broker.weights.publish(policy, entry(0))
        return found

    monkeypatch.setattr(broker.weights, "newest", published_meanwhile)
    assert await broker.weights.wait_newer("main", -1, 5) == entry(0)


async def test_a_follower_wakes_up_for_the_newest(broker: Broker) -> None:
    waiting = asyncio.create_task(broker.weights.wait_newer("main", -1, 10))
    await broker.weights.publish("main", entry(0))
    assert await waiting == entry(0)
    await broker.weights.publish("main", entry(1))
    await broker.weights.publish("main", entry(2))
    assert await broker.weights.wait_newer("main", 0, 10) == entry(2)
    assert await broker.weights.wait_newer("main", 2, 0.05) is None

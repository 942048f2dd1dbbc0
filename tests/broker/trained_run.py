"""A run with trained batches, and what must be true of its archive."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from commands import LACHESIS, python
from scored import group, trained
from warm import WarmProcess

from lachesis.broker import Broker
from lachesis.broker.archive.segments import Archive, Archived

BATCH = 4
SIZES = (2, 1, 3, 2)  # don't fit batches in the order they come


async def train(
    broker: Broker, steps: int, *, start: int = 0, covered: bool = True, v: int = 0
) -> dict[int, list[bytes]]:
    """Post groups and train `steps` batches of them. Returns each step's groups as they are stored."""
    queue, stored, number = broker.queue, {}, start * 100
    await queue.subscribe("main")
    for _ in range(steps):
        while (lease := await queue.lease_or_form("main", "t", BATCH, lapse_s=60)) is None:
            await queue.put(f"g{number}", group(number, SIZES[number % len(SIZES)]), v_min=v, v_max=v)
            number += 1
        stored[lease.batch.step] = await queue.blobs(lease.batch.gids)
        await queue.commit("main", lease, trained(lease.batch))
        if covered:
            await queue.retire("main", lease.batch.step)
    return stored


def archiver(url: str, run: str, folder: Path | str, *options: str, crash_at: str = "") -> WarmProcess:
    """A real archiver process that makes small segments."""
    where = ("--redis-url", url, "--run", run, "--to", str(folder))
    small = ("--segment-bytes", "900", "--segment-s", "0.2", "--archiver-lease-s", "1")
    return python.start(
        *LACHESIS, "archive", *where, *small, *options,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"LACHESIS_CRASH_AT": crash_at},
    )  # fmt: skip


def read(folder: Path | str) -> list[Archived]:
    notes: list[str] = []
    found = list(Archive(str(folder)).read(note=notes.append))
    assert notes == []
    return found


async def unfreed(broker: Broker) -> dict[int, list[bytes]]:
    """What Redis still holds, by step; each batch with all of its groups."""
    return {batch.step: await broker.queue.blobs(batch.gids) for batch in await broker.queue.batches()}

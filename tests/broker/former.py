"""Forms, leases and commits batches of 8 until it is killed: `former.py <redis url> <run>`. Prints the first step."""

from __future__ import annotations

import asyncio
import os
import sys

from lachesis.broker import Broker, LeaseLost
from lachesis.broker.records.steps import LedgerEntry


async def main(url: str, run: str) -> None:
    broker = await Broker.connect(url, run)
    name = f"former{os.getpid()}"
    told = False
    while True:
        await broker.registry.touch_env(1)
        lease = await broker.queue.lease_or_form("main", name, 8, lapse_s=0.2)
        if lease is None:
            await broker.queue.wait_for_group(0.05)
            continue
        if not told:
            print(lease.batch.step, flush=True)
            told = True
        batch = lease.batch
        entry = LedgerEntry(batch.step, batch.gids, batch.n, batch.tok, 0, 0, 0, 0, name, 0.0, 0.0, 0.0)
        try:
            await broker.queue.commit("main", lease, entry)
        except LeaseLost:  # it took longer than the lease
            continue


asyncio.run(main(*sys.argv[1:]))

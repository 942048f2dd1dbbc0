"""Replicas of one policy on a Redis, as processes, and what is to be found when they end."""

from __future__ import annotations

import json
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import elastic_process
import torch
from elastic_process import Settings, TinyCompute, batch_of
from msgspec import structs
from scored import group
from trainer_kit import PATIENCE_S, context, stored, until

from lachesis.broker import BlockingBroker, connect_blocking
from lachesis.broker.audit import audit
from lachesis.broker.records.steps import LedgerEntry

STEPS, GROUPS = 6, 6  # groups of a step, of two sequences each
SILENT_S = 2.0  # a busy machine stops nobody for so long


class Run:
    """One run on a Redis, and its replicas."""

    def __init__(self, url: str, name: str, folder: Path, **settings: Any) -> None:
        self.url, self.name, self.folder, self._settings = url, name, folder, settings
        self.processes: dict[str, ForkServerProcess] = {}
        self.steps, self._queued = settings.get("steps", STEPS), 0
        folder.mkdir()

    def queue(self, steps: int) -> None:
        """Queue the groups of the steps up to this one; where there are none, the replicas wait."""
        with connect_blocking(self.url, self.name) as broker:
            for number in range(self._queued * GROUPS, steps * GROUPS):
                broker.call(broker.broker.queue.put, f"g{number:03d}", group(number % 64), v_min=0, v_max=0)
        self._queued = steps

    def start(self, name: str, *, crash_at: str = "", **settings: Any) -> ForkServerProcess:
        told = Settings(self.url, self.name, str(self.folder), name, **(self._settings | settings))
        process = context.Process(target=elastic_process.main, args=(told, crash_at))
        process.start()
        self.processes[name] = process
        return process

    def exit_of(self, name: str) -> int | None:
        """How it ended, waiting for that; None if it does not."""
        self.processes[name].join(PATIENCE_S)
        return self.processes[name].exitcode

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


async def read_ledger(broker: BlockingBroker) -> list[LedgerEntry]:
    return [entry async for entry in broker.broker.queue.ledger("main")]


def ledger_of(broker: BlockingBroker) -> list[LedgerEntry]:
    return broker.call(read_ledger, broker)


def versions_of(broker: BlockingBroker) -> list[tuple[int, str]]:
    found = broker.call(broker.broker.redis.xrange, broker.broker.keys.weights("main"))
    return [(int(fields[b"version"]), fields[b"manifest_sha256"].decode()) for _, fields in found]


def check(run: Run, expected: list[tuple[int, str]], *finished: str) -> None:
    """Every step is there once, every version has the weights of an undisturbed run, and so have those that finished."""
    for name in finished:
        assert run.exit_of(name) == 0, run.log(name)
        told = json.loads((run.folder / f"{name}.json").read_text())
        assert told == {"step": expected[-1][0], "digest": expected[-1][1]}, name
    with connect_blocking(run.url, run.name) as broker:
        assert [entry.step for entry in ledger_of(broker)] == list(range(1, expected[-1][0] + 1))
        assert versions_of(broker) == expected
        assert broker.call(audit, broker.broker).findings == []
        assert broker.call(broker.broker.queue.status).untrainable == expected[-1][0]  # one of each step, once


def trained_alone(ledger: list[LedgerEntry]) -> list[tuple[int, str]]:
    """(version, hash of the weights) of one that trains those steps' groups in this process."""
    accumulator = TinyCompute()
    found = [(0, accumulator.digest())]
    for entry in ledger:
        groups = [structs.replace(stored(group(int(gid[1:]) % 64)), gid=gid) for gid in entry.gids]
        told = accumulator.accumulate(batch_of(entry), list(enumerate(groups)))
        accumulator.apply(batch_of(entry), accumulator.sums(torch.device("cpu")), told)
        found.append((entry.step, accumulator.digest()))
    return found


def with_leader(run: Run, **settings: Any) -> None:
    """Start a replica that leads all others started after it."""
    run.start("leader", **settings)
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: broker.call(broker.broker.members.members, "main"))


def step_of(broker: BlockingBroker) -> int:
    newest = broker.call(broker.broker.queue.newest_committed, "main")
    return newest.step if newest else 0

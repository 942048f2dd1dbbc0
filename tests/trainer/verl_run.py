"""Runs of six steps on a real Redis, whose trainers are processes with verl."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from trainer_kit import PATIENCE_S, start_trainer

from lachesis.broker import BlockingBroker, Broker, connect_blocking
from lachesis.broker.records.steps import LedgerEntry

STEPS, BATCH, GROUP = 6, 8, 4


class Run:
    """One run, with its own state folder."""

    def __init__(self, url: str, name: str, state_dir: Path, model: Path) -> None:
        self.url, self.name, self.state_dir, self.model = url, name, state_dir, model

    def start(self, *overrides: str, crash_at: str = "", log: str = "trainer.log") -> Any:
        settings = {
            "actor_rollout_ref.model.path": str(self.model),
            "actor_rollout_ref.actor.optim.lr": "1e-2",
            "lachesis.batch_size": str(BATCH),
            "lachesis.num_steps": str(STEPS),
            "lachesis.checkpoint_every": "2",
            "lachesis.lease_s": "3",
        } | dict(override.split("=", 1) for override in overrides)
        words = [f"{key}={value}" for key, value in settings.items()]
        return start_trainer(self.url, self.name, self.state_dir, words, crash_at=crash_at, log=self.state_dir / log)

    def finish(self, process: Any) -> int | None:
        process.join(PATIENCE_S)
        exitcode: int | None = process.exitcode
        return exitcode

    def broker(self) -> AbstractContextManager[BlockingBroker]:
        return connect_blocking(self.url, self.name)

    def weights(self, version: int, policy: str = "main") -> dict[str, Tensor]:
        return load_file(self.state_dir / f"weights/{self.name}/{policy}/v{version:06d}/model.safetensors")


async def ledger(broker: Broker, policy: str = "main") -> list[LedgerEntry]:
    return [entry async for entry in broker.queue.ledger(policy)]


async def versions(broker: Broker, policy: str = "main") -> list[int]:
    return [int(fields[b"version"]) for _, fields in await broker.redis.xrange(broker.keys.weights(policy))]


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)

"""A replica as a process of its own, of a tiny float64 policy whose rollouts are `scored.group`s.

Its checkpoints, its log and what it ends with are files of its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import torch
from network import enter
from torch import Tensor

from lachesis.broker import BlockingBroker, connect_blocking
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.groups import DeadEntry, Group
from lachesis.broker.records.steps import BatchEntry, LedgerEntry, Membership
from lachesis.broker.records.versions import WeightsEntry
from lachesis.broker.replicas.members import Rendezvous
from lachesis.broker.retention.dead_letters import untrainable
from lachesis.trainer.elastic.accumulator import LocalAccumulator
from lachesis.trainer.elastic.collectives.reproducible_sum import ReproducibleSum, total
from lachesis.trainer.elastic.config import ElasticConfig, StepRecord
from lachesis.trainer.elastic.replica import ElasticReplica
from lachesis.trainer.loop import training_loop
from lachesis.trainer.writer_lock import WriterLease

if TYPE_CHECKING:  # it needs verl
    from lachesis.trainer.elastic.leader import Leader

WORDS, WIDTH, EVERY = 64, 8, 3  # tokens, size of the hidden layer, steps between checkpoints


class Settings(msgspec.Struct, frozen=True):
    url: str
    run: str
    folder: str
    name: str
    steps: int = 6
    batch_size: int = 12
    compute_s: float = 0.0  # of one group, most of it waited
    together_s: float = 0.0  # groups are claimed one by one
    silent_s: float = 5.0
    hold_s: float = 1.5
    namespace: str = ""  # of the network
    stop_at: str = ""  # a crash point, to wait at for SIGCONT


class TinyCompute(LocalAccumulator):
    """Next-token log-probs of an embedding and a linear layer, weighted by scores; Adam by hand."""

    def __init__(self, compute_s: float = 0.0) -> None:
        self._compute_s = compute_s
        self.took_s: dict[int, float] = {}  # step → seconds of this replica's groups
        self.begin()

    def begin(self) -> None:
        """As if nothing had been trained."""
        generator = torch.Generator().manual_seed(0)
        self.theta = torch.randn(2 * WORDS * WIDTH, dtype=torch.float64, generator=generator)
        self.first, self.second = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.updates = torch.zeros(1, dtype=torch.float64)
        self.clear()

    def accumulate(self, batch: BatchEntry, claimed: Sequence[tuple[int, Group]]) -> list[bytes]:
        before = time.perf_counter() - self.took_s.get(batch.step, 0.0)
        for _, group in claimed:
            began = time.perf_counter()
            theta = self.theta.clone().requires_grad_()
            embedding, head = theta.view(2, WORDS, WIDTH)
            tokens = torch.stack([torch.tensor(row, dtype=torch.int64) for row in group.tokens])
            scores = torch.tensor(group.scores)
            log_probs = torch.log_softmax(embedding[tokens[:, :-1]] @ head.T, -1)
            loss = -(scores[:, None] * log_probs.gather(-1, tokens[:, 1:, None])[..., 0]).sum()
            (gradient,) = torch.autograd.grad(loss, theta)
            count = torch.tensor([float(tokens[:, 1:].numel())], dtype=torch.float64)
            self._sum.add(torch.cat([gradient, loss.detach()[None], count]))
            time.sleep(max(0.0, began + self._compute_s - time.perf_counter()))
        self.took_s[batch.step] = time.perf_counter() - before
        return [group.gid.encode() for _, group in claimed]

    def sums(self, device: torch.device) -> list[Tensor]:
        return [self._sum.parts.clone()]

    def clear(self) -> None:
        self._sum = ReproducibleSum(len(self.theta) + 2)

    def apply(self, batch: BatchEntry, sums: Sequence[Tensor], told: Sequence[bytes]) -> None:
        assert [gid.decode() for gid in told] == list(batch.gids)
        found = total(sums[0])
        gradient = found[:-2] / found[-1]
        self.updates += 1
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(gradient**2, 0.01)
        mean = self.first / (1 - 0.9**self.updates)
        spread = self.second / (1 - 0.99**self.updates)
        self.theta -= 0.05 * mean / (spread.sqrt() + 1e-8)
        self.clear()

    def entry(
        self, batch: BatchEntry, before: int, sums: Sequence[Tensor], told: Sequence[bytes]
    ) -> tuple[LedgerEntry, list[DeadEntry]]:
        found = total(sums[0])
        entry = LedgerEntry(
            batch.step, batch.gids, batch.n, batch.tok, before, batch.step, batch.v_min, before, "",
            0.0, (found[-2] / found[-1]).item(), 0.0,
        )  # fmt: skip
        return entry, [untrainable(gid.decode(), 0, "a test") for gid in told[:1]]

    def state(self) -> tuple[bytes, list[Tensor]]:
        return b"{}", [self.theta.clone(), self.first.clone(), self.second.clone(), self.updates.clone()]

    def blank(self, header: bytes) -> list[Tensor]:
        return [torch.zeros_like(part) for part in self.state()[1]]

    def load(self, header: bytes, tensors: Sequence[Tensor]) -> None:
        self.theta, self.first, self.second, self.updates = tensors

    def digest(self) -> str:
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in self.state()[1])).hexdigest()


class TinyLeader:
    """Checkpoints as files, versions as nothing but the hash of their weights."""

    def __init__(self, broker: BlockingBroker, accumulator: TinyCompute, folder: Path) -> None:
        self._broker, self._accumulator, self._folder = broker, accumulator, folder

    def resume(self, writer_lease: WriterLease) -> int:
        async def read() -> list[LedgerEntry]:
            return [entry async for entry in self._broker.broker.queue.ledger("main")]

        ledger = self._broker.call(read)
        saved = max((int(path.stem) for path in self._folder.glob("*.pt")), default=0)
        if saved:
            self._accumulator.load(b"{}", torch.load(self._folder / f"{saved}.pt", weights_only=True))
        else:
            self._accumulator.begin()
            self._publish(0)
        for entry in ledger[saved:]:
            groups = self._broker.call(self._broker.broker.queue.fetch, entry.gids)
            told = self._accumulator.accumulate(batch_of(entry), list(enumerate(groups)))
            self._accumulator.apply(batch_of(entry), self._accumulator.sums(torch.device("cpu")), told)
            failpoint("replayed", entry.step)
            self.follow_up(entry.step)
        return len(ledger)

    def follow_up(self, step: int) -> None:
        self.publish(step)
        self.save(step)

    def publish(self, step: int) -> None:
        self._publish(step)
        failpoint("published", step)

    def save(self, step: int) -> None:
        path = self._folder / f"{step}.pt"
        if step and step % EVERY == 0 and not path.exists():
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            torch.save(self._accumulator.state()[1], aside)
            failpoint("saving", step)
            aside.rename(path)
            failpoint("saved", step)
            self._broker.call(self._broker.broker.queue.retire, "main", step)

    def met(self, rendezvous: Rendezvous, me: Membership) -> None:
        print("met", rendezvous, me)

    def opened(self, step: int) -> None:
        self._broker.call(self._broker.broker.queue.deliver, step)

    def settle(self) -> None:
        """Nothing is under way."""

    def collect(self, record: StepRecord, entry: LedgerEntry) -> None:
        """Nobody reads it."""

    def report(self, record: StepRecord, entry: LedgerEntry, seconds: dict[str, float]) -> None:
        """Likewise."""

    def finish(self, step: int) -> None:
        """The next one replays what it must."""

    def resign(self) -> None:
        """It holds nothing."""

    def _publish(self, step: int) -> None:
        weights = self._broker.broker.weights
        newest = self._broker.call(weights.newest, "main")
        if newest is None or newest.version < step:
            digest = self._accumulator.digest()
            entry = WeightsEntry(step, step, "memory:", digest, 0, "F64", step - 1)
            self._broker.call(weights.publish, "main", entry)


def batch_of(entry: LedgerEntry) -> BatchEntry:
    return BatchEntry(entry.step, entry.gids, entry.n, entry.tok, entry.v_min, entry.v_min, 0.0)


def main(settings: Settings, crash_at: str = "", kind: type[TinyCompute] = TinyCompute) -> None:
    output = os.open(f"{settings.folder}/{settings.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if settings.namespace:
        enter(settings.namespace)
    os.environ["LACHESIS_CRASH_AT"], os.environ["LACHESIS_STOP_AT"] = crash_at, settings.stop_at
    torch.set_num_threads(1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    config = ElasticConfig(
        "main", settings.batch_size, settings.steps, settings.silent_s, settings.hold_s, together_s=settings.together_s
    )
    accumulator = kind(settings.compute_s)
    with connect_blocking(settings.url, settings.run) as broker:
        broker.call(broker.broker.queue.subscribe, "main")
        leader = cast("Leader", TinyLeader(broker, accumulator, Path(settings.folder)))
        with ElasticReplica(broker, config, settings.name, accumulator, lambda _: leader, stop.is_set) as replica:
            training_loop(replica)
            told: dict[str, Any] = {"step": replica.weights_step, "digest": accumulator.digest()}
            (Path(settings.folder) / f"{settings.name}.json").write_text(json.dumps(told))
            (Path(settings.folder) / f"took-{settings.name}.json").write_text(json.dumps(accumulator.took_s))

"""Are the versions known that made what unmodified environments post? `python benchmarks/lineage.py`.

Environments of atroposlib (rollouts.py), a front door, two SGLang servers, a shim and a trainer that does nothing but ask
for batches, while a version is published every second and a half. Of every sequence that was posted, each trained token
has to be covered by a version, and to have the log-prob that Hugging Face computes with the weights of that version.
Prints a table, writes benchmarks/results/lineage.json, and ends with 1 where a must is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pools
from hf_reference import Reference
from report import report
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.groups import Group
from lachesis.broker.records.steps import LedgerEntry
from lachesis.service.ports import find_free

WORK = (("single", "sglang", 1000), ("single", "vllm", 1000), ("turns", "sglang", 500), ("turns", "vllm", 500))
MUST = {"single": 0.999, "turns": 0.99}  # of the sequences are joined
MUST_DELTA = 1e-4  # nats, float32
PUBLISH_EVERY_S = 1.5
READY_S = 120.0
TRAINER = {
    "wandb_group": "lineage", "wandb_project": "lineage", "batch_size": 64, "max_token_len": 512, "checkpoint_dir": "",
    "save_checkpoint_interval": 0, "starting_step": 0, "num_steps": 1_000_000,
}  # fmt: skip
console = Console(width=160)


@dataclass(frozen=True)
class Row:
    """Sequences of one environment, through one of atroposlib's server classes."""

    environment: str
    server_type: str
    sequences: int
    turns: float  # runs of trained tokens in a sequence, mean
    tokens: int  # trained ones
    versions: int  # that made them
    mixed: int  # sequences of more than one version
    joined: int  # as the shim counts
    unknown: int
    mismatched: int
    covered: int  # sequences whose stored spans hold every trained token, and nothing else
    delta: float  # largest |Δ log-prob| between what was posted and Hugging Face under the stored version
    other_delta: float  # the same under the version before, median over sequences: delta can tell versions apart
    failed: int  # rollouts and posts that the environment's log calls errors

    @property
    def rate(self) -> float:
        return min(self.joined, self.covered) / self.sequences

    @property
    def good(self) -> bool:
        whole = self.joined + self.unknown == self.sequences and self.mismatched == 0
        known = self.rate >= MUST[self.environment] and self.delta <= MUST_DELTA
        return whole and known and not self.failed and self.other_delta > 100 * MUST_DELTA


class Versions(pools.Versions):
    """Neighbours differ enough to tell by a log-prob which one made a token."""

    def weights(self, base: Any) -> list[tuple[str, Any]]:
        import torch

        random = torch.Generator().manual_seed(self.newest)
        return [
            (name, tensor + 0.1 * torch.randn(tensor.shape, generator=random) * (tensor.dim() > 1))
            for name, tensor in base.items()
        ]


class Rig:
    """Everything but environments: addresses, and what was posted so far."""

    def __init__(self, broker: Broker, versions: Versions, shim: str, door: str, folder: Path) -> None:
        self.broker, self.versions, self.shim, self.door, self.folder = broker, versions, shim, door, folder
        self._reference = Reference(versions.path)
        self._seen: set[str] = set()

    async def counts(self) -> dict[str, int]:
        async with aiohttp.ClientSession() as client, client.get(f"{self.shim}/healthz") as response:
            counts: dict[str, int] = (await response.json())["lineage"]
            return counts

    @contextmanager
    def environment(self, kind: str, server_type: str) -> Iterator[subprocess.Popen[bytes]]:
        options = {
            "env.rollout_server_url": self.shim, "env.tokenizer_name": self.versions.model,
            "openai.base_url": f"{self.door}/v1", "openai.server_type": server_type, "openai.model_name": self.versions.model,
        }  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in options.items()]
        log = self.folder / f"{kind}-{server_type}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rollouts.py")), kind, "serve", *arguments],
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    async def measure(self, kind: str, server_type: str, sequences: int, tell: Callable[[int], None]) -> Row:
        """Let an environment post so many sequences; `tell` is called with how many there are."""
        before, made = await self.counts(), 0
        with self.environment(kind, server_type) as process:
            while made < sequences:
                if process.poll() is not None:
                    raise RuntimeError(f"the environment ended: see {self.folder}/{kind}-{server_type}.log")
                await asyncio.sleep(0.5)
                counts = await self.counts()
                made = sum(counts[name] - before[name] for name in ("joined", "unknown"))
                tell(made)
        await asyncio.sleep(2)  # what it had sent is stored by now
        after = await self.counts()
        groups = await self._new_groups()
        counts = {name: after[name] - before[name] for name in ("joined", "unknown", "mismatched")}
        log = (self.folder / f"{kind}-{server_type}.log").read_text()
        failed = log.count("Error in collect_trajectories") + log.count("Failed to send")
        return Row(kind, server_type, **counts, **self._examine(groups), failed=failed)

    async def _new_groups(self) -> list[Group]:
        queue = self.broker.queue
        gids = [gid for batch in await queue.batches() for gid in batch.gids]
        gids += [entry.gid for _, entry in await queue.queued()]
        new = [gid for gid in gids if gid not in self._seen]
        self._seen.update(new)
        return await queue.fetch(new)

    def _examine(self, groups: Sequence[Group]) -> dict[str, Any]:
        runs = tokens = mixed = covered = 0
        by_version: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = defaultdict(list)
        for group in groups:
            assert group.inference_logprobs is not None
            spans = group.versions or [()] * len(group.tokens)
            for row, mask, posted, known in zip(
                group.tokens, group.masks, group.inference_logprobs, spans, strict=True
            ):
                trained = mask != -100
                versions = np.full(len(row), -1)
                for version, start, end in known:
                    versions[start:end] = version
                runs += int(np.count_nonzero(np.diff(trained.astype(int), prepend=0) == 1))
                tokens += int(trained.sum())
                covered += bool(((versions >= 0) == trained).all())
                mixed += len(set(versions[trained].tolist())) > 1
                for version in set(versions[versions >= 0].tolist()):
                    by_version[version].append((row, posted, versions == version))
        apart, others = [0.0], [0.0]
        for version, rows in by_version.items():
            apart += self._deltas(version, rows)
            if version > 1:
                others += self._deltas(version - 1, rows)
        sequences = sum(len(group.tokens) for group in groups)
        return {
            "sequences": sequences, "turns": runs / sequences, "tokens": tokens, "versions": len(by_version),
            "mixed": mixed, "covered": covered, "delta": max(apart), "other_delta": statistics.median(others),
        }  # fmt: skip

    def _deltas(self, version: int, rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[float]:
        """Per row of (tokens, posted log-probs, which of them count): the largest |Δ log-prob| under a version."""
        import torch

        longest = max(len(tokens) for tokens, _, _ in rows)
        padded = torch.zeros(len(rows), longest, dtype=torch.int64)
        for index, (tokens, _, _) in enumerate(rows):
            padded[index, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        ours = self._reference.log_probs(version, padded).numpy()  # of tokens 1 to T - 1
        return [
            float(np.abs(row[: len(posted) - 1] - posted[1:])[which[1:]].max())
            for row, (_, posted, which) in zip(ours, rows, strict=True)
        ]


@asynccontextmanager
async def rig(folder: Path) -> AsyncIterator[Rig]:
    """All of it at work: versions are published, and batches trained, until the block ends."""
    versions = Versions(folder / "store", pools.make_model(folder / "model", 64, 2))
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        shim, door = (f"http://127.0.0.1:{find_free('127.0.0.1')}" for _ in range(2))
        common = ("--redis-url", redis.url)
        state = (*common, "--state-dir", str(folder))
        stack.enter_context(pools.lachesis(folder, "shim", *common, "--port", shim.rpartition(":")[2]))
        stack.enter_context(pools.lachesis(folder, "front-door", *state, "--port", door.rpartition(":")[2]))
        for number in range(pools.SERVERS):
            options = ("--server", f"s{number}", "--model", str(versions.model))
            stack.enter_context(pools.lachesis(folder, "inference", *state, *options))
        broker = await Broker.connect(redis.url)
        stack.push_async_callback(broker.aclose)
        async with asyncio.timeout(READY_S):
            while [server.state for server in await broker.registry.servers("main")] != ["ready"] * pools.SERVERS:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        async with aiohttp.ClientSession(shim) as client:
            (await client.post("/register", json=TRAINER)).raise_for_status()
            (await client.get("/batch")).raise_for_status()  # environments wait for a trainer's first call
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in (_publish(broker, versions), _train(broker))]
            yield Rig(broker, versions, shim, door, folder)
            for task in running:
                task.cancel()


async def _publish(broker: Broker, versions: Versions) -> None:
    while True:
        await versions.write(broker)
        await asyncio.sleep(PUBLISH_EVERY_S)


async def _train(broker: Broker) -> None:
    """Take every batch as a trainer does."""
    queue = broker.queue
    await queue.subscribe("main")
    while True:
        lease = await queue.lease_or_form("main", "t", int(str(TRAINER["batch_size"])), lapse_s=60)
        if lease is None:
            await asyncio.sleep(0.1)
            continue
        batch = lease.batch
        ends = {"v_before": batch.v_max, "v_after": batch.v_max, "v_min": batch.v_min, "lag": batch.v_max - batch.v_min}
        entry = LedgerEntry(
            batch.step, batch.gids, batch.n, batch.tok, **ends, replica="t", reward=0, loss=0, seconds=0
        )
        await queue.commit("main", lease, entry)


async def run(folder: Path, share: float) -> list[Row]:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    rows = []
    columns = (*Progress.get_default_columns()[:3], TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        starting = progress.add_task("two SGLang servers start", total=None)
        async with rig(folder) as found:
            progress.remove_task(starting)
            for kind, server_type, sequences in WORK:
                wanted = int(share * sequences)
                task = progress.add_task(f"{kind} through {server_type}", total=wanted)
                tell = partial(_tell, progress, task)
                rows.append(await found.measure(kind, server_type, wanted, tell))
    return rows


def _tell(progress: Progress, task: TaskID, made: int) -> None:
    progress.update(task, completed=made)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a tenth of the sequences")
    quick = options.parse_args().quick
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(run(Path(name), 0.1 if quick else 1.0))
    table = Table(
        "environment", "sequences", "turns", "tokens", "versions", "mixed", "joined", "unknown", "mismatched", "covered",
        "rate", "must", "max |Δ|", "at v − 1", "",
        title=f"Lineage of unmodified environments, a version every {PUBLISH_EVERY_S} s ({time.monotonic() - began:.0f} s)",
    )  # fmt: skip
    for row in rows:
        counts = (row.joined, row.unknown, row.mismatched, row.covered)
        table.add_row(
            f"{row.environment}, {row.server_type}", str(row.sequences), f"{row.turns:.2f}", str(row.tokens), str(row.versions),
            str(row.mixed), *map(str, counts), f"{row.rate:.2%}", f"≥ {MUST[row.environment]:.1%}",
            f"{row.delta:.1e}", f"{row.other_delta:.1e}", "must" if row.good else "MISSED",
        )  # fmt: skip
    console.print(table)
    return report(
        "lineage", rows, [f"{row.environment}, {row.server_type}" for row in rows if not row.good], console, quick=quick
    )


if __name__ == "__main__":
    sys.exit(main())

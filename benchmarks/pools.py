"""How soon does a pool serve a new version, and how long do its servers stand still? `python benchmarks/pools.py`.

Two SGLang servers, all clients busy, models of two sizes. First the benchmark itself drives the servers, with nothing but
SGLang's own calls: what a load costs alone. Then agents do, behind a front door: from the event to the last server serving
it, and each server's pause. Prints a table, writes benchmarks/results/pools.json, and ends with 1 where a must is missed.
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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from report import report
from rich.console import Console
from rich.table import Table

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.inference.agent import sglang_args
from lachesis.inference.agent.sglang_process import SGLangServer
from lachesis.inference.settings import AgentSettings
from lachesis.inference.versions.model_folder import read_model_folder
from lachesis.service.ports import find_free
from lachesis.trainer.weights.versions import VersionStore

SIZES = {"2 MB": (128, 2), "100 MB": (512, 8)}  # of float32 weights: hidden size and layers
SERVERS = 2
CLIENTS = 8
TOKENS = 64  # of an answer
MUST_EVENT_S, MUST_STALL_S = 0.25, 0.05  # beyond the time of the load
READY_S = 120.0
console = Console(width=140)


@dataclass(frozen=True)
class Row:
    """Seconds, medians over updates (and servers); `at_once` servers load at the same time."""

    size: str
    at_once: int
    alone_s: float  # SGLang's load of a paused server, driven directly
    verify_s: float  # before the pause: hashes, tensors, values
    load_s: float  # SGLang's load under an agent
    checksum_s: float  # SGLang's hash of its weights: on a CPU SHA-256, on CUDA a kernel at the memory's speed
    stall_s: float  # pause to continue
    event_s: float  # publish to the last server serving it

    @property
    def waves(self) -> int:
        return SERVERS // self.at_once

    @property
    def over_event_s(self) -> float:
        return self.event_s - self.waves * self.alone_s

    @property
    def beside_s(self) -> float:
        """Of the stall, what is neither the load nor the checksum."""
        return self.stall_s - self.load_s - self.checksum_s

    @property
    def over_stall_s(self) -> float:
        return self.stall_s - self.alone_s

    @property
    def good(self) -> bool:
        return self.over_event_s <= MUST_EVENT_S and self.over_stall_s <= MUST_STALL_S


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """A Qwen2 with random weights in float32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lachesis.envs.arithmetic.base_model import VOCAB, make_tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, dtype="float32",
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Versions:
    """A store that a trainer would write to; each version has other weights."""

    def __init__(self, folder: Path, model: Path) -> None:
        from safetensors.torch import load_file

        self.model, self._tensors = model, load_file(model / "model.safetensors")
        self._store, self.newest = VersionStore(folder, model, dtype="fp32"), 0

    def weights(self, base: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Of the newest version."""
        return [(name, tensor * 0.999**self.newest) for name, tensor in base.items()]

    def path(self, version: int) -> Path:
        return self._store.path(version)

    async def write(self, broker: Broker | None = None) -> tuple[Path, float]:
        """(folder, when it was announced) of the next version."""
        self.newest += 1
        tensors = self._store.copy(self.newest, self.weights(self._tensors))
        entry = self._store.write(self.newest, self.newest, self.newest - 1, tensors)
        began = time.monotonic()
        if broker is not None:
            await broker.weights.publish("main", entry)
        return Path(entry.uri), began


@asynccontextmanager
async def busy(urls: Sequence[str]) -> AsyncIterator[None]:
    """Clients that generate without pause, spread over the urls; an answer that is none is an error."""
    random = np.random.default_rng(0)

    async def client(url: str, session: aiohttp.ClientSession) -> None:
        while True:
            body = {
                "input_ids": random.integers(4, 300, 16).tolist(),
                "sampling_params": {"max_new_tokens": TOKENS, "ignore_eos": True},
                "return_logprob": True,
            }
            async with session.post(f"{url}/generate", json=body) as response:
                response.raise_for_status()
                await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [asyncio.create_task(client(urls[number % len(urls)], session)) for number in range(CLIENTS)]
        await asyncio.sleep(1)
        yield
        for task in clients:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def alone(versions: Versions, folder: Path, updates: int, at_once: int) -> float:
    """Median seconds of a load, the benchmark driving SGLang."""
    settings = AgentSettings()
    async with AsyncExitStack() as stack:
        servers = []
        for number in range(SERVERS):
            port = find_free("127.0.0.1")
            argv = sglang_args.command_line(
                settings, sglang_args.find_python(""), sglang_args.find_device("auto"), port
            )
            environment = sglang_args.environment(sglang_args.find_device("auto"), os.environ)
            url, log = f"http://127.0.0.1:{port}", folder / f"alone-{number}.log"
            servers.append(await stack.enter_async_context(SGLangServer(argv, environment, url, log)))
        options = sglang_args.model_options(
            settings, sglang_args.find_device("auto"), read_model_folder(versions.model), 0
        )
        await asyncio.gather(*(server.start_model(options, READY_S) for server in servers))
        found: list[float] = []

        async def update(server: SGLangServer, version: Path) -> None:
            await server.pause("retract")
            began = time.perf_counter()
            await server.load(version, versions.newest, flush_cache=True)
            found.append(time.perf_counter() - began)
            await server.resume()

        async with busy([server.url for server in servers]):
            for _ in range(updates):
                version, _ = await versions.write()
                for start in range(0, SERVERS, at_once):
                    await asyncio.gather(*(update(server, version) for server in servers[start : start + at_once]))
                await asyncio.sleep(0.5)
    return statistics.median(found)


@contextmanager
def lachesis(folder: Path, name: str, *arguments: str) -> Iterator[None]:
    """One of our processes, for as long as the block lasts."""
    with open(folder / "processes.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lachesis.cli.main", name, *arguments], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def pooled(versions: Versions, folder: Path, updates: int, at_once: int) -> dict[str, float]:
    """Medians of a pool of agents behind a front door, by field of Row."""
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        common = ("--redis-url", redis.url, "--state-dir", str(folder))
        door = f"http://127.0.0.1:{(port := find_free('127.0.0.1'))}"
        stack.enter_context(lachesis(folder, "front-door", *common, "--port", str(port)))
        for number in range(SERVERS):
            options = ("--server", f"s{number}", "--model", str(versions.model), "--update-at-once", str(at_once))
            stack.enter_context(lachesis(folder, "inference", *common, *options))
        broker = await Broker.connect(redis.url)
        stack.push_async_callback(broker.aclose)

        async def all_at(version: int) -> float:
            async with asyncio.timeout(READY_S):
                while True:
                    servers = await broker.registry.servers("main")
                    if [(s.version, s.state) for s in servers] == [(version, "ready")] * SERVERS:
                        return time.monotonic()
                    await asyncio.sleep(0.002)

        await all_at(0)
        versions.newest = 0
        events = []
        async with busy([door]):
            for _ in range(updates):
                _, announced = await versions.write(broker)
                events.append(await all_at(versions.newest) - announced)
                await asyncio.sleep(0.5)
        entries = [fields for _, fields in await broker.journal.metrics() if fields["kind"] == "update"]
    names = {"verify_s": "verify_s", "load_s": "load_s", "checksum_s": "checksum_s", "stall_s": "pause_s"}
    medians = {name: statistics.median(float(entry[theirs]) for entry in entries) for name, theirs in names.items()}
    return {**medians, "event_s": statistics.median(events)}


def measure(folder: Path, updates: int) -> Iterator[Row]:
    for size, (hidden, layers) in SIZES.items():
        model = make_model(folder / size / "model", hidden, layers)
        for at_once in (SERVERS, 1):
            console.print(f"{size}, {at_once} at once …")
            place = folder / size / str(at_once)
            place.mkdir()
            bare = asyncio.run(alone(Versions(place / "alone", model), place, updates, at_once))
            yield Row(
                size, at_once, bare, **asyncio.run(pooled(Versions(place / "pool", model), place, updates, at_once))
            )


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--updates", type=int, default=9, help="updates of each kind, whose medians count")
    updates = options.parse_args().updates
    with tempfile.TemporaryDirectory() as name:
        rows = list(measure(Path(name), updates))
    table = Table(
        "weights", "at once", "load alone", "verify", "load", "checksum", "rest", "stall", "− load", "must", "event → all", "− loads", "must", "",
        title=f"{SERVERS} SGLang servers, {CLIENTS} clients, medians in ms",
    )  # fmt: skip
    for row in rows:
        parts = (row.alone_s, row.verify_s, row.load_s, row.checksum_s, row.beside_s, row.stall_s, row.over_stall_s)
        ms = [f"{1000 * value:.0f}" for value in parts]
        ms += [f"≤ {1000 * MUST_STALL_S:.0f}", f"{1000 * row.event_s:.0f}", f"{1000 * row.over_event_s:.0f}"]
        table.add_row(row.size, str(row.at_once), *ms, f"≤ {1000 * MUST_EVENT_S:.0f}", "must" if row.good else "MISSED")
    console.print(table)
    return report(
        "pools", rows, [f"{row.size}, {row.at_once} at once" for row in rows if not row.good], console, quick=False
    )


if __name__ == "__main__":
    sys.exit(main())

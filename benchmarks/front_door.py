"""What does a front door cost? `python benchmarks/front_door.py [--quick] [--router PATH]`.

An instant server answers 256 output tokens with log-probs; a front door before it records the lineage of each answer.
Measures its CPU time per call, the latency it adds to one client's calls, and calls a second with many clients, beside
sglang-router 0.3.2 (which records nothing) where `--router` names it or PATH has it. Prints a table and writes
benchmarks/results/front_door.json. Ends with 1 where a measure misses what it must reach.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop
from instant import VOCABULARY, ask, instant_server, question
from report import report
from rich.console import Console
from rich.table import Table
from servers import cpu_ms, resident_kib, serving

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.versions import ServerStatus
from lachesis.service.ports import find_free

CLIENTS = 32
console = Console(width=120)


@dataclass(frozen=True)
class Row:
    """One measure, of both; `must` and `aim` bound the front door's, from above unless `at_least`."""

    measure: str
    unit: str
    router: float | None
    front_door: float
    must: float | None = None
    aim: float | None = None
    at_least: bool = False

    def reaches(self, bound: float | None) -> bool:
        if bound is None:
            return True
        return self.front_door >= bound if self.at_least else self.front_door <= bound


@dataclass(frozen=True)
class Cost:
    """Of calls through one process, or straight to the server."""

    cpu_ms: float  # of the process, per call, with many clients
    rate: float  # calls a second with many clients
    p50_ms: float  # with one client
    p99_ms: float
    resident_mib: float


def cost(pid: int, port: int, questions: list[bytes], blocks: int) -> Cost:
    """Medians of `blocks` repetitions."""
    uvloop.run(ask(port, questions[:200], CLIENTS))  # connections, caches
    cpu, rates, waits = [], [], []
    for _ in range(blocks):
        before, began = cpu_ms(pid), time.perf_counter()
        uvloop.run(ask(port, questions, CLIENTS))
        cpu.append((cpu_ms(pid) - before) / len(questions))
        rates.append(len(questions) / (time.perf_counter() - began))
        waits.append(sorted(uvloop.run(ask(port, questions[: len(questions) // 4], 1))))
    p50, p99 = (statistics.median(wait[int(len(wait) * share)] for wait in waits) * 1e3 for share in (0.5, 0.99))
    return Cost(statistics.median(cpu), statistics.median(rates), p50, p99, resident_kib(pid) / 1024)


def front_door(redis_url: str, port: int) -> list[str]:
    return [sys.executable, "-m", "lachesis.cli.main", "front-door", "--redis-url", redis_url, "--port", str(port)]


def sglang_router(program: str, url: str, port: int) -> list[str]:
    listening = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1"]
    return [program, "launch", *listening, "--prometheus-port", str(find_free("127.0.0.1")), "--worker-urls", url]


async def beat(broker: Broker, url: str) -> None:
    """Be the server's agent."""
    while True:
        status = ServerStatus("instant", "main", url, "ready", 8, -1, time.time(), vocab_size=VOCABULARY)
        await broker.registry.report(status)
        await asyncio.sleep(1)


def _report(redis_url: str, url: str) -> None:
    async def main() -> None:
        await beat(await Broker.connect(redis_url), url)

    asyncio.run(main())


def measure(router: str | None, calls: int, blocks: int) -> list[Row]:
    import multiprocessing

    questions = [question(number) for number in range(calls)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        assert redis.pid is not None
        url = stack.enter_context(instant_server())
        reporter = multiprocessing.get_context("spawn").Process(target=_report, args=(redis.url, url), daemon=True)
        reporter.start()
        stack.callback(reporter.kill)
        alone = cost(os.getpid(), int(url.rpartition(":")[2]), questions, blocks)
        theirs = None
        if router:
            port = find_free("127.0.0.1")
            with serving(sglang_router(router, url, port), port, folder / "router.log") as pid:
                time.sleep(3)  # it answers before it knows its server
                theirs = cost(pid, port, questions, blocks)
        port = find_free("127.0.0.1")
        pid = stack.enter_context(serving(front_door(redis.url, port), port, folder / "front_door.log"))
        redis_before = cpu_ms(redis.pid)
        ours = cost(pid, port, questions, blocks)
        redis_ms = (cpu_ms(redis.pid) - redis_before) / (200 + blocks * (calls + calls // 4))
        lost = asyncio.run(_lost(port))
        if lost:
            sys.exit(f"lineage of {lost} calls was lost")

    def row(name: str, unit: str, field: str, less: float = 0.0, **bounds: float | bool) -> Row:
        them = None if theirs is None else getattr(theirs, field) - less
        return Row(name, unit, them, getattr(ours, field) - less, **bounds)  # type: ignore[arg-type]

    per_core = Row(
        "calls a second of CPU", "calls/s", None if theirs is None else 1e3 / theirs.cpu_ms, 1e3 / ours.cpu_ms,
        must=600, aim=1000, at_least=True,
    )  # fmt: skip
    return [
        row("CPU per call of 256 output tokens", "ms", "cpu_ms", must=1.5, aim=1.0),
        per_core,
        row(f"calls a second, {CLIENTS} clients, all on this machine's cores", "calls/s", "rate"),
        row("added latency, one client, p50", "ms", "p50_ms", alone.p50_ms, must=2.0, aim=1.5),
        row("added latency, one client, p99", "ms", "p99_ms", alone.p99_ms),
        Row("CPU of Redis per call, for its lineage", "ms", None, redis_ms),
        row("resident memory", "MiB", "resident_mib"),
    ]


async def _lost(port: int) -> int:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/health") as response:
        return int((await response.json())["lineage_lost"])


def table(rows: list[Row]) -> Table:
    shown = Table("measure", "sglang-router", "front door", "must", "aim", "", title="a front door, lineage recorded")
    for row in rows:
        verdict = (
            "" if row.must is None else "aim" if row.reaches(row.aim) else "must" if row.reaches(row.must) else "MISSED"
        )
        theirs = "" if row.router is None else f"{row.router:.3g} {row.unit}"
        bounds = ["" if bound is None else f"{bound:g} {row.unit}" for bound in (row.must, row.aim)]
        shown.add_row(row.measure, theirs, f"{row.front_door:.3g} {row.unit}", *bounds, verdict)
    return shown


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer calls: half a minute")
    options.add_argument("--router", default=shutil.which("sglang-router"), help="path of sglang-router")
    chosen = options.parse_args()
    calls, blocks = (1000, 3) if chosen.quick else (4000, 7)
    rows = measure(chosen.router, calls, blocks)
    console.print(table(rows))
    return report(
        "front_door", rows, [row.measure for row in rows if not row.reaches(row.must)], console, quick=chosen.quick
    )


if __name__ == "__main__":
    sys.exit(main())

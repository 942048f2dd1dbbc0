"""How much cheaper than atroposlib's own server? `python benchmarks/shim.py [--quick]`.

Starts `run-api` and `lachesis shim` beside each other, sends both the same groups of 8 x 2048 tokens with masks and
log-probs, and measures CPU time of the server process (Redis apart, and told), wall time and memory. Prints a table and
writes benchmarks/results/shim.json. Ends with 1 where a measure misses what it must reach.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from report import report
from rich.console import Console
from rich.table import Table
from servers import (
    BATCH,
    SEQUENCES,
    Server,
    cpu_ms,
    group,
    lachesis,
    numbered,
    resident_kib,
    small_groups,
    upstream,
)  # fmt: skip

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.packing import PACKED_TYPE, pack
from lachesis.shim.intake.simdjson_decoder import read_group

GROUPS = BATCH // SEQUENCES  # in a batch
RATE = 100  # status requests a second
console = Console(width=132)


@dataclass(frozen=True)
class Sizes:
    blocks: int  # repetitions whose median counts
    batches: int
    served: int  # batches served while status requests are timed
    queued: int  # groups in the long queue
    kept: int  # groups whose memory is measured


FULL = Sizes(blocks=7, batches=7, served=60, queued=10_000, kept=512)
QUICK = Sizes(blocks=3, batches=3, served=12, queued=2_000, kept=128)


@dataclass(frozen=True)
class Row:
    """One measure. `share`: must and aim bound Lachesis's part of upstream's, else Lachesis's own value."""

    measure: str
    unit: str
    upstream: float | None
    lachesis: float
    must: float
    aim: float
    share: bool = False
    note: str = ""

    @property
    def judged(self) -> float:
        return self.lachesis / self.upstream if self.share and self.upstream else self.lachesis

    @property
    def good(self) -> bool:
        return self.judged <= self.must

    def limit(self, value: float) -> str:
        return f"1/{1 / value:.0f}" if self.share else f"{value:g} {self.unit}"


@dataclass(frozen=True)
class Cost:
    """Medians of one call."""

    cpu: float  # ms of the server process
    wall: float  # ms
    redis: float  # ms of CPU


class Bench:
    def __init__(self, theirs: Server, ours: Server, redis: EmbeddedRedis, sizes: Sizes) -> None:
        assert redis.pid is not None
        self.theirs, self.ours, self.redis, self.redis_pid, self.sizes = theirs, ours, redis, redis.pid, sizes
        self.bodies = [group(number) for number in range(2 * GROUPS)]

    def cost(self, server: Server, calls: Callable[[], int], before: Callable[[], None], times: int) -> Cost:
        """What one call costs: `calls` makes several and says how many; `before` prepares for each repetition."""
        found = []
        for _ in range(times):
            before()
            marks = cpu_ms(server.pid), time.perf_counter_ns() / 1e6, cpu_ms(self.redis_pid)
            count = calls()
            after = cpu_ms(server.pid), time.perf_counter_ns() / 1e6, cpu_ms(self.redis_pid)
            found.append([(late - early) / count for early, late in zip(marks, after, strict=True)])
        return Cost(*map(statistics.median, zip(*found, strict=True)))

    # -- groups in ------------------------------------------------------------------------------------------------

    def posts(self) -> list[Row]:
        compressed = [gzip.compress(body, 9) for body in self.bodies]
        packed = [pack(found) for body in self.bodies if (found := read_group(body))]
        rows = []
        for name, bodies, headers, must, aim in (
            ("POST /scored_data, JSON", self.bodies, {}, 1 / 4, 1 / 6),
            ("POST /scored_data, JSON in gzip", compressed, {"Content_Encoding": "gzip"}, 1 / 3, 1 / 5),
        ):
            theirs, ours = (self._post(server, bodies, headers) for server in (self.theirs, self.ours))
            rows.append(Row(name, "ms CPU", theirs.cpu, ours.cpu, must, aim, share=True, note=_told(theirs, ours)))
        ours = self._post(self.ours, packed, {"Content_Type": PACKED_TYPE})
        return [*rows, Row("POST /scored_data, packed", "ms CPU", None, ours.cpu, 0.6, 0.4, note=_told(None, ours))]

    def _post(self, server: Server, bodies: list[bytes], headers: dict[str, str]) -> Cost:
        def calls() -> int:
            for body in bodies:
                server.call("POST", "/scored_data", body, **headers)
            return len(bodies)

        return self.cost(server, calls, server.reset, self.sizes.blocks)

    # -- batches out ----------------------------------------------------------------------------------------------

    def batches(self) -> list[Row]:
        rows = []
        for encoding, must, aim in (("identity", 1 / 40, 1 / 80), ("gzip", 1 / 20, 1 / 40)):
            theirs = self._batch(self.theirs, encoding, min(3, self.sizes.batches))
            ours = self._batch(self.ours, encoding, self.sizes.batches)
            name = f"GET /batch of {BATCH} sequences, {encoding}"
            rows.append(Row(name, "ms CPU", theirs.cpu, ours.cpu, must, aim, share=True, note=_told(theirs, ours)))
        return rows

    def _batch(self, server: Server, encoding: str, times: int) -> Cost:
        def fill() -> None:
            server.reset()
            for body in self.bodies[:GROUPS]:
                server.call("POST", "/scored_data", body)

        def calls() -> int:
            if len(server.call("GET", "/batch", Accept_Encoding=encoding)) < 1 << 20:
                sys.exit("GET /batch answered no batch")
            return 1

        return self.cost(server, calls, fill, times)

    # -- status ---------------------------------------------------------------------------------------------------

    def status_while_serving(self) -> list[Row]:
        theirs = self._latency(self.theirs, min(3, self.sizes.served))
        ours = self._latency(self.ours, self.sizes.served)
        return [Row(f"p99 of /status-env, {RATE}/s, while batches are served", "ms", theirs, ours, 50, 20)]

    def _latency(self, server: Server, batches: int) -> float:
        server.reset()
        for number in range(batches * GROUPS):
            server.call("POST", "/scored_data", numbered(self.bodies[number % GROUPS], number))
        context = multiprocessing.get_context("spawn")
        spans = context.SimpleQueue()
        puller = context.Process(target=_pull, args=(server.port, batches, spans))
        puller.start()
        spans.get()  # it is ready
        asked = asyncio.run(_ask(server.port, puller.is_alive))
        served = [spans.get() for _ in range(batches)]
        during = [
            (answered - due) * 1e3 for due, answered in asked if any(began <= due <= ended for began, ended in served)
        ]
        return statistics.quantiles(during, n=100)[98]

    def status_of_a_long_queue(self) -> list[Row]:
        theirs, ours = self._growth(self.theirs), self._growth(self.ours)
        name = f"/status-env at {self.sizes.queued:,} queued groups against 10"
        return [Row(name, "x CPU", theirs, ours, 1.5, 1.1)]

    def _growth(self, server: Server) -> float:
        costs = []
        for queued in (10, self.sizes.queued):

            def fill(queued: int = queued) -> None:
                server.reset()
                server.call("POST", "/scored_data_list", small_groups(queued))

            def calls() -> int:
                for _ in range(RATE):
                    server.call("GET", "/status-env", b'{"env_id": 0}')
                return RATE

            costs.append(self.cost(server, calls, fill, 3).cpu)
        return costs[1] / costs[0]

    # -- memory, forming ------------------------------------------------------------------------------------------

    def memory(self) -> list[Row]:
        theirs = self._kept([self.theirs.pid], self.theirs, min(128, self.sizes.kept))
        ours = self._kept([self.ours.pid, self.redis_pid], self.ours, self.sizes.kept)
        return [Row("resident memory of a queued group, server and Redis", "KiB", theirs, ours, 120, 90)]

    def _kept(self, pids: list[int], server: Server, groups: int) -> float:
        server.reset()
        marks = []
        for first in (0, groups):
            for number in range(first, first + groups):
                server.call("POST", "/scored_data", numbered(self.bodies[number % len(self.bodies)], number))
            marks.append(sum(map(resident_kib, pids)))
        return (marks[1] - marks[0]) / groups

    def forming(self) -> list[Row]:
        self.ours.reset()
        self.ours.call("POST", "/scored_data_list", small_groups(self.sizes.queued))

        async def form() -> list[float]:
            broker = await Broker.connect(self.redis.url)
            spent = []
            for _ in range(self.sizes.blocks):
                began = time.perf_counter()
                assert await broker.queue.form(64 * SEQUENCES) is not None
                spent.append((time.perf_counter() - began) * 1e3)
            await broker.aclose()
            return spent

        ours = statistics.median(asyncio.run(form()))
        return [Row(f"FORM of 64 groups from a queue of {self.sizes.queued:,}", "ms", None, ours, 10, 3)]


def _told(theirs: Cost | None, ours: Cost) -> str:
    before = f"{theirs.wall:.1f} -> " if theirs else ""
    return f"wall {before}{ours.wall:.1f} ms, Redis {ours.redis:.2f} ms CPU"


def _pull(port: int, batches: int, spans: multiprocessing.SimpleQueue[tuple[float, float]]) -> None:
    """In a process of its own: take batches, one after the other, and tell when."""
    server = Server(0, port)
    server.call("GET", "/info")
    spans.put((0.0, 0.0))
    for _ in range(batches):
        began = time.monotonic()
        server.call("GET", "/batch", Accept_Encoding="identity")
        spans.put((began, time.monotonic()))


async def _ask(port: int, more: Callable[[], bool]) -> list[tuple[float, float]]:
    """(when a status request was due, when it was answered), RATE a second, each sent on time."""
    asked = []

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(due: float) -> None:
            async with session.get(f"http://127.0.0.1:{port}/status-env", json={"env_id": 0}) as response:
                await response.read()
            asked.append((due, time.monotonic()))

        due = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while more():
                tasks.create_task(ask(due))
                due += 1 / RATE
                await asyncio.sleep(due - time.monotonic())
    return asked


def table(rows: list[Row]) -> Table:
    shown = Table("measure", "upstream", "Lachesis", "ratio", "must", "aim", "", title="lachesis shim beside run-api")
    for row in rows:
        ratio = "" if not row.upstream else f"1/{row.upstream / row.lachesis:.1f}"
        verdict = "aim" if row.judged <= row.aim else "must" if row.good else "MISSED"
        theirs = "" if row.upstream is None else f"{row.upstream:.4g} {row.unit}"
        shown.add_row(
            row.measure,
            theirs,
            f"{row.lachesis:.3g} {row.unit}",
            ratio,
            row.limit(row.must),
            row.limit(row.aim),
            verdict,
        )
    return shown


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer repetitions and a shorter queue: a minute")
    sizes = QUICK if options.parse_args().quick else FULL
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with EmbeddedRedis(folder / "redis") as redis, upstream(folder) as theirs, lachesis(folder, redis.url) as ours:
            bench = Bench(theirs, ours, redis, sizes)
            stages = (
                bench.memory, bench.posts, bench.batches, bench.status_while_serving, bench.status_of_a_long_queue,
                bench.forming,
            )  # fmt: skip
            for number, stage in enumerate(stages, 1):
                console.print(f"{time.monotonic() - began:5.1f} s  {number} of {len(stages)}: {stage.__name__} …")
                for row in stage():
                    rows.append(row)
                    console.print(f"         {row.measure}: {row.lachesis:.3g} {row.unit} {row.note}")
    console.print(table(rows))
    return report("shim", rows, [row.measure for row in rows if not row.good], console, quick=sizes is QUICK)


if __name__ == "__main__":
    sys.exit(main())

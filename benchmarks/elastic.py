"""What replicas of one policy cost and bring: `python benchmarks/elastic.py`.

First the protocol: the compute of a group is mostly a wait, of fixed length, so that four replicas on two cores show the
protocol, not the cores. What a step takes beyond the compute of that replica which computed longest is the protocol's:
claims, sums, votes. One replica is killed, one stopped, one joins. Then real trainers, with verl and groups that are small
beside what a pass costs: one trainer that is no replica, and replicas. Prints a table, writes
benchmarks/results/elastic.json, and ends with 1 where a must is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / room) for room in ("", "trainer")]

import elastic_process  # noqa: E402
import together_kit  # noqa: E402
from report import report  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from scored import group  # noqa: E402
from trainer_kit import context, make_tiny_model, preload, scored_group, until  # noqa: E402

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking  # noqa: E402
from lachesis.broker.records.steps import LedgerEntry, Member  # noqa: E402
from lachesis.trainer.elastic.config import ElasticConfig  # noqa: E402

GROUPS, COMPUTE_S = 24, 0.05  # groups of a step, seconds of a group
SILENT_S = 2.0
SMALL, SEQUENCES, WARM = 32, 8, 5  # of a real step: groups, sequences of each; steps before those that count
console = Console(width=130)


@dataclass(frozen=True)
class Row:
    measure: str
    value: float
    unit: str
    must: float | None = None  # at most so much; of a speedup, at least
    note: str = ""

    @property
    def good(self) -> bool:
        if self.must is None:
            return True
        return self.value >= self.must if self.unit == "x" else self.value <= self.must


class Replicas:
    """Replicas as processes on a run of their own, whose groups' compute is a wait."""

    def __init__(self, url: str, folder: Path, name: str, steps: int) -> None:
        self.url, self.name, self.folder, self.steps = url, name, folder / name, steps
        self.folder.mkdir()
        self.processes: list[Any] = []

    def start(self, who: str) -> None:
        told = elastic_process.Settings(
            self.url, self.name, str(self.folder), who, steps=self.steps, batch_size=2 * GROUPS, compute_s=COMPUTE_S,
            silent_s=SILENT_S, together_s=ElasticConfig.together_s,
        )  # fmt: skip
        self.processes.append(context.Process(target=elastic_process.main, args=(told,)))
        self.processes[-1].start()

    def fill(self, broker: BlockingBroker) -> None:
        for number in range(self.steps * GROUPS):
            broker.call(broker.broker.queue.put, f"g{number}", group(number % 64), v_min=0, v_max=0)

    def join(self) -> None:
        """Wait for all; who was not killed must have trained to the end."""
        for process in self.processes:
            process.join()
            if process.exitcode not in (0, -signal.SIGKILL):
                logs = "\n".join(path.read_text() for path in self.folder.glob("*.log"))
                sys.exit(f"a replica ended with {process.exitcode}:\n{logs}")


async def _ledger(broker: BlockingBroker) -> list[LedgerEntry]:
    return [entry async for entry in broker.broker.queue.ledger("main")]


def newest(broker: BlockingBroker) -> LedgerEntry | None:
    return broker.call(broker.broker.queue.newest_committed, "main")


def step_s(url: str, folder: Path, replicas: int, steps: int) -> tuple[float, float]:
    """Seconds of a step that all replicas trained, mean; and of the compute of that one which computed longest."""
    run = Replicas(url, folder, f"speed{replicas}", steps)
    with connect_blocking(url, run.name) as broker:
        run.fill(broker)
        for number in range(replicas):
            run.start(f"r{number}")
        run.join()
        entries = [entry for entry in broker.call(_ledger, broker) if len(entry.replica.split()) == replicas]
    took = [json.loads(path.read_text()) for path in run.folder.glob("took-*.json")]
    longest = [max(one.get(str(entry.step), 0.0) for one in took) for entry in entries[1:]]
    return (entries[-1].at - entries[0].at) / len(longest), statistics.fmean(longest)


def protocol(url: str, folder: Path, steps: int) -> Iterator[Row]:
    found = {count: step_s(url, folder, count, steps) for count in (1, 2, 4)}
    for count, (whole_s, compute_s) in found.items():
        above = 1000 * (whole_s - compute_s)
        note = f"{1000 * whole_s:.0f} ms a step of {GROUPS} groups, {1000 * compute_s:.0f} ms compute"
        yield Row(f"{count} replicas: a step above its compute", above, "ms", 20 if count == 4 else None, note)
    for count in (2, 4):
        yield Row(
            f"{count} replicas: steps beside one replica", found[1][0] / found[count][0], "x", {4: 3.4}.get(count)
        )
    orphaned_s = COMPUTE_S * GROUPS / 3
    killed = next_commit_s(url, folder, steps, signal.SIGKILL)
    yield Row("one of three killed: to the next commit", killed, "s", 1 + orphaned_s, "1 s + its groups' compute")
    stopped = next_commit_s(url, folder, steps, signal.SIGSTOP)
    yield Row("one of three stopped: to the next commit", stopped, "s", SILENT_S + 0.5, f"silent for {SILENT_S} s")
    yield Row("one joins: to having the weights", join_s(url, folder, steps), "s", 1)


def next_commit_s(url: str, folder: Path, steps: int, number: signal.Signals) -> float:
    """From a signal to one of three, in the middle of a step, to the next commit."""
    run = Replicas(url, folder, number.name, steps)
    with connect_blocking(url, run.name) as broker:
        run.fill(broker)
        for replica in range(3):
            run.start(f"r{replica}")
        until(lambda: (entry := newest(broker)) is not None and len(entry.replica.split()) == 3)
        time.sleep(0.2)
        before = newest(broker)
        assert before is not None
        began = time.time()
        os.kill(run.processes[-1].pid, number)
        while (entry := newest(broker)) is None or entry.step == before.step:
            time.sleep(0.002)
        run.processes[-1].kill()
        run.join()
    return entry.at - began


def join_s(url: str, folder: Path, steps: int) -> float:
    """From being a member of two others to having their weights."""
    run = Replicas(url, folder, "join", steps)
    with connect_blocking(url, run.name) as broker:

        def late() -> list[Member]:
            members = broker.call(broker.broker.members.members, "main")
            return [member for member in members if member.id.startswith("late")]

        run.fill(broker)
        for replica in range(2):
            run.start(f"r{replica}")
        until(lambda: (entry := newest(broker)) is not None and len(entry.replica.split()) == 2)
        run.start("late")
        until(late)
        began = time.perf_counter()
        while late()[0].step < 0:
            time.sleep(0.002)
        took_s = time.perf_counter() - began
        run.join()
    return took_s


def small_groups(url: str, folder: Path, steps: int) -> Iterator[Row]:
    """Steps of real trainers, on groups that wait in the queue."""
    model = make_tiny_model(folder / "model")
    together_kit.SETTINGS |= {
        "lachesis.batch_size": SMALL * SEQUENCES, "lachesis.num_steps": steps, "lachesis.checkpoint_every": 1000,
    }  # fmt: skip
    alone_s = 0.0
    for count in (0, 1, 2, 3):
        run = together_kit.Run(url, f"small{count}", folder / f"small{count}", model)
        run.folder.mkdir()
        with connect_blocking(url, run.name) as broker:
            names = [f"r{number}" for number in range(count)] or ["alone"]
            processes = [run.start(name, f"lachesis.elastic={str(count > 0).lower()}") for name in names]
            if count:
                run.wait_for(broker, count)
            for number in range(steps * SMALL):
                told = scored_group(random.Random(number), sequences=SEQUENCES)
                broker.call(broker.broker.queue.put, f"{number:08d}", told, v_min=0, v_max=0)
            for name, process in zip(names, processes, strict=True):
                process.join()
                if process.exitcode:
                    sys.exit(f"a trainer ended with {process.exitcode}:\n{run.log(name)}")
            at = [entry.at for entry in broker.call(_ledger, broker)][WARM:]
        took_s = (at[-1] - at[0]) / (len(at) - 1)
        alone_s = alone_s or took_s
        who = f"{count} replicas" if count else "one trainer that is none"
        note = f"{took_s / alone_s:.2f} of what the trainer takes that is none" if count else ""
        yield Row(
            f"verl, {SMALL} groups of {SEQUENCES} short sequences, {who}: a step", 1000 * took_s, "ms", None, note
        )


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer steps")
    quick = options.parse_args().quick
    os.environ |= {"VERL_PLATFORM": "cpu", "VERL_LOGGING_LEVEL": "WARN"}  # before anything imports verl
    preload()
    rows, steps = [], 10 if quick else 30
    table = Table("measure", "", "must", "", "", title="Replicas of one policy")
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(Path(folder) / "redis") as server,
        console.status("replicas train …") as status,
    ):
        for part in (protocol, small_groups):
            for row in part(server.url, Path(folder), steps):
                rows.append(row)
                status.update(f"{row.measure}: {row.value:.2f} {row.unit} …")
    for row in rows:
        sign = "" if row.must is None else f"{'≥' if row.unit == 'x' else '≤'} {row.must:g} {row.unit}"
        verdict = "" if row.must is None else "must" if row.good else "MISSED"
        table.add_row(row.measure, f"{row.value:.{0 if row.unit == 'ms' else 2}f} {row.unit}", sign, verdict, row.note)
    console.print(table)
    return report("elastic", rows, [row.measure for row in rows if not row.good], console, quick=quick)


if __name__ == "__main__":
    sys.exit(main())

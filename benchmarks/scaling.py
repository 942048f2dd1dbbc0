"""One trainer, then three, then two, in the middle of a run: does the reward curve notice? `python benchmarks/scaling.py`.

Runs `lachesis up` with lachesis.elastic=true twice, same seed: with one trainer throughout, and with two more that join
after step 20, of which one is killed with SIGKILL after step 50. Prints what happened as it happens, step by step, and
writes it, with both curves, to benchmarks/results/scaling.txt. The groups that arrive depend on timing, so the curves are
alike, not the same; that the sums are is shown by tests/trainer/elastic/test_elastic.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.store.embedded import EmbeddedRedis
from lachesis.cli.options import parse
from lachesis.cli.up import plan
from lachesis.cli.up.settings import UpSettings

ELASTIC = "lachesis.elastic=true"
JOIN_AT, KILL_AT = 20, 50
BINS = 10
Say = Callable[[str], None]


class Replicas:
    """Trainers beside the one of `lachesis up`, with its very settings."""

    def __init__(self, folder: Path, redis_url: str, steps: int) -> None:
        settings = parse(UpSettings, "up", ["--state-dir", str(folder), "--steps", str(steps), "--gpus", "0", ELASTIC])
        with socket.socket() as unused:
            processes = plan.Processes(settings, plan.plan(settings), redis_url, folder, unused, unused)
            self._part = processes.trainer()
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str) -> None:
        with open(self._folder / f"{name}.log", "wb") as log:
            argv = [*self._part.argv, f"lachesis.replica={name}"]
            environ = {**os.environ, **self._part.env}
            self._running.append(subprocess.Popen(argv, stdout=log, stderr=log, env=environ))

    def kill_last(self) -> None:
        last = self._running.pop()
        last.send_signal(signal.SIGKILL)
        last.wait()

    def end(self) -> None:
        for process in self._running:
            process.wait(60)  # they end by themselves after the last step


async def follow(url: str, steps: int, say: Say, replicas: Replicas | None) -> list[LedgerEntry]:
    """Tell each committed step, and scale when it is time. Returns the ledger."""
    broker = await Broker.connect(url)
    seen: list[LedgerEntry] = []
    began = time.time()
    last = began
    while len(seen) < steps:
        await anyio.sleep(0.2)
        members = len(await broker.members.members("main"))
        for entry in [entry async for entry in broker.queue.ledger("main")][len(seen) :]:
            say(
                f"{entry.at - began:7.1f} s  step {entry.step:3}  {members} replicas  reward {entry.reward:.3f}"
                f"  {entry.at - last:5.2f} s  lag {entry.lag}"
            )
            last = entry.at
            seen.append(entry)
            if replicas and entry.step == JOIN_AT:
                say("           two more trainers are started")
                replicas.start("second")
                replicas.start("third")
            if replicas and entry.step == KILL_AT:
                say("           one of them is killed with SIGKILL")
                replicas.kill_last()
    report = await audit(broker)
    say(
        f"           audit {'clean' if report.clean else report.findings}: {report.trained} groups in {report.steps} steps"
    )
    await broker.aclose()
    return seen


def run(folder: Path, steps: int, say: Say, *, scaled: bool) -> list[LedgerEntry]:
    command = [sys.executable, "-m", "lachesis.cli.main", "up", "--state-dir", str(folder), "--steps", str(steps)]
    command += ["--gpus", "0", "--shim-port", "0", "--front-door-port", "0", ELASTIC]
    folder.mkdir()
    with EmbeddedRedis(folder / "redis") as server, open(folder / "up.log", "w") as log:
        replicas = Replicas(folder, server.url, steps) if scaled else None
        up = subprocess.Popen([*command, "--redis-url", server.url], stdout=log, stderr=subprocess.STDOUT)
        found = anyio.run(follow, server.url, steps, say, replicas)
        if replicas:
            replicas.end()
        if up.wait():
            sys.exit(f"{' '.join(command)} failed:\n{(folder / 'up.log').read_text()}")
    return found


def curve(ledger: list[LedgerEntry]) -> str:
    rewards = [entry.reward for entry in ledger]
    size = -(-len(rewards) // BINS)
    return " ".join(f"{statistics.fmean(rewards[at : at + size]):.2f}" for at in range(0, len(rewards), size))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=80)
    chosen = options.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory() as name:
        say("one trainer, then three, then two")
        scaled = run(Path(name) / "scaled", chosen.steps, say, scaled=True)
        say("\none trainer throughout")
        alone = run(Path(name) / "alone", chosen.steps, say, scaled=False)
    say("\nreward by tenths of the run")
    say(f"  1, 3, 2 trainers  {curve(scaled)}")
    say(f"  1 trainer         {curve(alone)}")
    target = Path(__file__).parent / "results" / "scaling.txt"
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

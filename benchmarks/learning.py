"""Does the loop learn, how fast, and how much does the trainer wait? `python benchmarks/learning.py [--seeds 0 1 2]`.

Runs `lachesis up` on the tiny model, in folders of their own: once per seed, once with two batches that may wait for the
trainer instead of one (it then waits for no single slow group), and once with a learning rate of 0. Reads the ledger and the
metrics stream of each; prints one table and writes benchmarks/results/learning.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table

from lachesis.broker import Broker, EmbeddedRedis

BINS = 10


def run(folder: Path, seed: int, batches_ahead: int, overrides: list[str]) -> dict[str, Any]:
    """One whole `lachesis up`; its output goes to <folder>/up.log."""
    command = [sys.executable, "-m", "lachesis.cli.main", "up", "--state-dir", str(folder), "--seed", str(seed)]
    command += ["--shim-port", "0", "--front-door-port", "0", *overrides]
    environ = {**os.environ, "LACHESIS_MAX_BATCHES_OFFPOLICY": str(batches_ahead)}
    folder.mkdir(parents=True)
    began = time.monotonic()
    with open(folder / "up.log", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environ)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'up.log').read_text()}")
    with EmbeddedRedis(folder / "redis") as server:
        of = {"seed": seed, "batches_ahead": batches_ahead, "overrides": overrides, "seconds": seconds}
        return {**of, **anyio.run(read, server.url)}


async def read(url: str) -> dict[str, Any]:
    broker = await Broker.connect(url)
    entries, cursor = [], "0-0"
    while found := await broker.journal.metrics(cursor):
        entries += [fields for _, fields in found]
        cursor = found[-1][0]
    rewards = [entry.reward async for entry in broker.queue.ledger("main")]
    lags = [entry.lag async for entry in broker.queue.ledger("main")]
    await broker.aclose()
    steps = [fields for fields in entries if fields["kind"] == "step"]
    size = -(-len(rewards) // BINS)
    return {
        "steps": len(rewards),
        "curve": [statistics.fmean(rewards[start : start + size]) for start in range(0, len(rewards), size)],
        "last_10": statistics.fmean(rewards[-10:]),
        "held_out": [float(fields["accuracy"]) for fields in entries if fields["kind"] == "eval"],
        "lag_max": max(lags),
        "lag_mean": statistics.fmean(lags),
        "step_s": statistics.median(float(fields["step_s"]) for fields in steps),
        "wait_share": sum(float(f["wait_s"]) for f in steps[1:]) / sum(float(f["step_s"]) for f in steps[1:]),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--without-control", action="store_true", help="leave out the run with a learning rate of 0")
    chosen = options.parse_args()
    first = chosen.seeds[0]
    plan = [(seed, 1, list[str]()) for seed in chosen.seeds] + [(first, 2, [])]
    if not chosen.without_control:
        plan.append((first, 1, ["actor_rollout_ref.actor.optim.lr=0"]))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (seed, batches_ahead, overrides) in enumerate(plan):
            what = " ".join([f"seed {seed}, {batches_ahead} ahead", *overrides])
            print(f"run {index + 1} of {len(plan)}: {what}", flush=True)
            results.append(run(Path(folder) / str(index), seed, batches_ahead, overrides))
    table = Table(
        "seed", "ahead", "lr", "held-out", "last 10", "curve (tenths of the run)", "step s", "wait", "lag max", "wall s"
    )
    for result in results:
        table.add_row(
            str(result["seed"]),
            str(result["batches_ahead"]),
            "0" if result["overrides"] else "recipe",
            " -> ".join(f"{value:.3f}" for value in result["held_out"]),
            f"{result['last_10']:.3f}",
            " ".join(f"{value:.2f}" for value in result["curve"]),
            f"{result['step_s']:.2f}",
            f"{result['wait_share']:.1%}",
            str(result["lag_max"]),
            f"{result['seconds']:.0f}",
        )
    Console(width=150).print(table)
    target = Path(__file__).parent / "results" / "learning.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

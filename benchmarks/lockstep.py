"""Does learning lose by not waiting? `python benchmarks/lockstep.py [--seeds 0 1 2]`.

Runs `lachesis up` on the tiny model twice per seed, for the same number of groups: once strictly synchronously (lag 0: the
environment makes a batch when the server has the version trained from the last one), once as it is by default. Compares the
rewards of the last ten steps and the time both take. Prints a table, writes benchmarks/results/lockstep.json, and ends with
1 where the asynchronous runs stay behind by more than MARGIN, or a synchronous one was none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from learning import run
from rich.console import Console
from rich.table import Table

MARGIN = 0.02  # of a mean reward of ten steps: two standard errors of one run, of 2,560 answers that are right nine times in ten
BATCHES_AHEAD = 1  # as the environment's recipe has it
MODES = {"synchronous": ["lachesis.lockstep=true"], "asynchronous": []}


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    shown = Table(
        "seed", "", "steps", "lag", "last 10", "held-out", "step s", "wait", "wall s", title="in lockstep or not"
    )
    for pair in zip(*results.values(), strict=True):
        for mode, result in zip(results, pair, strict=True):
            shown.add_row(
                str(result["seed"]),
                mode,
                str(result["steps"]),
                f"{result['lag_mean']:.2f}",
                f"{result['last_10']:.3f}",
                " -> ".join(f"{value:.3f}" for value in result["held_out"]),
                f"{result['step_s']:.2f}",
                f"{result['wait_share']:.0%}",
                f"{result['seconds']:.0f}",
            )
    return shown


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("overrides", nargs="*", help="further Hydra overrides, for both")
    chosen = options.parse_args()
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in chosen.seeds:
            for mode, overrides in MODES.items():
                print(f"seed {seed}, {mode}", flush=True)
                results[mode].append(
                    run(Path(folder) / f"{mode}-{seed}", seed, BATCHES_AHEAD, [*overrides, *chosen.overrides])
                )
    console = Console(width=132)
    console.print(table(results))
    synchronous, asynchronous = (statistics.fmean(result["last_10"] for result in results[mode]) for mode in MODES)
    console.print(f"mean reward of the last ten steps: synchronous {synchronous:.3f}, asynchronous {asynchronous:.3f}")
    target = Path(__file__).parent / "results" / "lockstep.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"margin": MARGIN, "results": results}, indent=1) + "\n")
    missed = []
    if asynchronous < synchronous - MARGIN:
        missed.append(f"asynchronous runs stay behind by {synchronous - asynchronous:.3f}")
    if any(result["lag_max"] for result in results["synchronous"]):
        missed.append("a synchronous run had a lag")
    if len({result["steps"] for mode in results.values() for result in mode}) > 1:
        missed.append("runs of different lengths")
    if missed:
        console.print(f"missed: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

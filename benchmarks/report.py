"""The end of a benchmark: its result file, what it missed, and its exit code."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from servers import cpu_model


def report(name: str, rows: Sequence[Any], missed: Sequence[str], console: Console, *, quick: bool) -> int:
    """Write benchmarks/results/<name>.json, with the machine it ran on. Returns 1 where a goal was missed."""
    target = Path(__file__).parent / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "cpu": cpu_model(), "quick": quick}
    target.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if missed:
        console.print(f"missed: {'; '.join(missed)}")
    return 1 if missed else 0

"""`lachesis COMMAND …` as a process, without the wait for its imports."""

from __future__ import annotations

import subprocess
from pathlib import Path

from warm import WarmPython

from lachesis.cli.catalogue import COMMANDS

LACHESIS = ("-m", "lachesis.cli.main")
LATER = (
    "lachesis.cli.commands.entries",
    "lachesis.cli.up.run",
    "lachesis.shim.main",
)  # imported once a command has its settings
python = WarmPython(*dict.fromkeys(c.module.partition(":")[0] for c in COMMANDS.values()), *LATER)


def lachesis(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return python.run(*LACHESIS, *arguments, cwd=cwd)

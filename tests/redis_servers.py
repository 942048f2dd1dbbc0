"""The servers that tools/get-servers knows, for tests: `EmbeddedRedis(folder, server=binary(name), config=[…])`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FITTING = ("redis-7.0", "valkey-8.0", "valkey-9.1", "redis-8.2")
TOO_OLD = "redis-6.2"
NOT_HERE = 3  # exit status of tools/get-servers for a server that this machine can't have


@functools.cache
def binary(name: str) -> str:
    """Path of that server, fetched if need be. Where it can't be had the test is skipped, saying why; a failure fails."""
    command, environment = [str(ROOT / "tools" / "get-servers"), name], {**os.environ, "SERVERS_PYTHON": sys.executable}
    got = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    said = (got.stdout + got.stderr).strip()
    if got.returncode == NOT_HERE:
        pytest.skip(said)
    assert got.returncode == 0, said
    return str(ROOT / ".servers" / name / "redis-server")

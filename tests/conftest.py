"""Fixtures every room's tests share: a real Redis, started for the test and gone with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [name for name in os.environ if name.startswith("LACHESIS_")]:
    del os.environ[_name]

import pytest

from lachesis.broker import Broker, EmbeddedRedis

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-long", action="store_true", help="the long form of the tests that kill processes")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def installed() -> Callable[[str], str]:
    """Path of a server that tools/get-servers has or fetches. Skips, saying why, where its packages can't be had."""

    @cache
    def find(name: str) -> str:
        command = [ROOT / "tools" / "get-servers", name]
        environment = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        if done.returncode == 3:
            pytest.skip(done.stdout.strip())
        assert done.returncode == 0, done.stdout + done.stderr
        return str(ROOT / ".servers" / name / "redis-server")

    return find


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """One server for all tests that need no server of their own."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server of the test's own, to kill, fill or restart."""
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def run_name(request: pytest.FixtureRequest) -> str:
    """A run of the test's own on the shared server."""
    return f"t{abs(hash(request.node.nodeid)) % 10**12}"


@pytest.fixture
async def broker(shared_redis: EmbeddedRedis, run_name: str) -> AsyncIterator[Broker]:
    client = await Broker.connect(shared_redis.url, run_name)
    yield client
    await client.aclose()

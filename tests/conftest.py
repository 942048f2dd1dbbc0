"""Fixtures every room's tests share: a real Redis, started for the test and gone with it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [name for name in os.environ if name.startswith("LACHESIS_")]:
    del os.environ[_name]

import pytest

from lachesis.broker import Broker, EmbeddedRedis


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-long", action="store_true", help="the long form of the tests that kill processes")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


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

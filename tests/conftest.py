"""Fixtures every room's tests share: a real Redis, started for the test and gone with it. How tests are run: tiers.py."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [name for name in os.environ if name.startswith("LACHESIS_")]:
    del os.environ[_name]

import pytest
from redis_servers import FITTING, binary

from lachesis.broker import Broker, EmbeddedRedis

pytest_plugins = ["tiers"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", choices=FITTING, help="the server that tests run against, else the embedded one")


@pytest.fixture(scope="session")
def server_binary(request: pytest.FixtureRequest) -> str | None:
    """Path of the server that tests start; None for the one a user would get."""
    name = request.config.getoption("--server")
    return binary(name) if name else None


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def installed() -> Callable[[str], str]:
    """Path of a server that tools/get-servers has or fetches. Skips, saying why, where its packages can't be had."""
    return binary


@pytest.fixture(scope="session")
def shared_redis(server_binary: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """One server for all tests that need no server of their own."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), server=server_binary) as server:
        yield server


@pytest.fixture
def redis_server(server_binary: str | None, tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server of the test's own, to kill, fill or restart."""
    with EmbeddedRedis(tmp_path / "redis", server=server_binary) as server:
        yield server


@pytest.fixture
def run_name(request: pytest.FixtureRequest) -> str:
    """A run of the test's own on the shared server."""
    return f"t{sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
async def broker(shared_redis: EmbeddedRedis, run_name: str) -> AsyncIterator[Broker]:
    client = await Broker.connect(shared_redis.url, run_name)
    yield client
    await client.aclose()

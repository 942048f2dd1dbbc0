"""Runs, which end with their test, and what replicas train that nothing happens to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_run import STEPS, Run, versions_of

from lachesis.broker import EmbeddedRedis, connect_blocking


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(url: str, name: str, *, queued: int | None = None, **settings: Any) -> Run:
        """A run whose groups are queued, all of them or those of so many steps."""
        runs.append(Run(url, name, tmp_path / name, **settings))
        runs[-1].queue(runs[-1].steps if queued is None else queued)
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture(scope="session")
def undisturbed(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """(version, hash of the weights) of one replica that nothing happens to, and of three."""
    found = []
    for count in (1, 3):
        run = Run(shared_redis.url, f"undisturbed{count}", tmp_path_factory.mktemp("undisturbed") / str(count))
        run.queue(STEPS)
        with connect_blocking(run.url, run.name) as broker:
            for number in range(count):
                run.start(f"r{number}")
            for number in range(count):
                assert run.exit_of(f"r{number}") == 0, run.log(f"r{number}")
            found.append(versions_of(broker))
            assert [version for version, _ in found[-1]] == list(range(STEPS + 1))
    assert found[0] == found[1]
    return found[0]

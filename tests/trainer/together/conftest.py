"""Runs of replicas, which end with their test, and runs that nothing happens to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from together_kit import Run, Undisturbed, train, train_in_ranks

from lachesis.broker import EmbeddedRedis


@pytest.fixture
def make_run(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, tiny_model: Path
) -> Iterator[Callable[[], Run]]:
    runs: list[Run] = []

    def make() -> Run:
        runs.append(Run(shared_redis.url, run_name, tmp_path, tiny_model))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def undisturbed(
    shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Undisturbed]:
    """`undisturbed(2, EXACT)`: a run of two replicas that nothing happens to, and its steps' metrics; made once."""
    runs: list[Run] = []

    @functools.cache
    def made(replicas: int, *overrides: str, ranks: int = 1) -> tuple[Run, list[dict[str, str]]]:
        folder = tmp_path_factory.mktemp("undisturbed")
        run = Run(shared_redis.url, f"together-{folder.name}", folder, tiny_model)
        runs.append(run)
        if ranks == 1:
            return run, train(run, replicas, *overrides)
        train_in_ranks(run, replicas)
        return run, []

    yield made
    for run in runs:
        run.end()

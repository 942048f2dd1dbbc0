"""A first run of the demo, and the base model that it made, which other runs start from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from demo import FIRST_STEPS, MODEL, Demo


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A run of a few steps that began with nothing, as a user's does; it has ended."""
    demo = Demo(tmp_path_factory.mktemp("demo") / "state", "--steps", str(FIRST_STEPS))
    try:
        demo.end()
        yield demo
    finally:
        demo.kill()


@pytest.fixture
def up(first_run: Demo, tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """`up("--steps", "8")` starts a run in the test's own folder, which has the base model already."""
    started: list[Demo] = []
    state = tmp_path / "state"
    shutil.copytree(first_run.folder / MODEL, state / MODEL)

    def start(*options: str) -> Demo:
        started.append(Demo(state, *options))
        return started[-1]

    yield start
    for demo in started:
        demo.kill()

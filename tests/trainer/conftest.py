"""A tiny model, and verl engines in this process."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from trainer_kit import make_tiny_model, preload

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking

pytest.register_assert_rewrite("elastic_run", "same_step", "together_kit")
os.environ["VERL_PLATFORM"] = "cpu"  # before anything imports verl
os.environ["VERL_LOGGING_LEVEL"] = "WARN"

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.engine.verl_engine import Engine


@pytest.fixture
def blocking(shared_redis: EmbeddedRedis, run_name: str) -> Iterator[BlockingBroker]:
    with connect_blocking(shared_redis.url, run_name) as broker:
        yield broker


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", autouse=True)
def _forkserver(request: pytest.FixtureRequest) -> None:
    """Let the process that trainers are forked from import verl while other tests run."""
    if any(item.get_closest_marker("verl") for item in request.session.items):
        preload()


@pytest.fixture(scope="session")
def configured(tiny_model: Path) -> Callable[..., DictConfig]:
    """`configured("lachesis.seed=1")` composes the trainer's configuration for the tiny model."""
    from lachesis.trainer.config.compose import compose_config

    @functools.cache  # composing takes a second
    def composed(*overrides: str) -> DictConfig:
        return compose_config(overrides, device="cpu")

    def compose(*overrides: str, model: Path = tiny_model) -> DictConfig:
        defaults = (f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.actor.optim.lr=1e-2")
        return copy.deepcopy(composed(*defaults, *overrides))

    return compose


@pytest.fixture(scope="session")
def built(configured: Callable[..., DictConfig]) -> Callable[..., tuple[Engine, DictConfig]]:
    """`built("lachesis.seed=1")` makes a fresh engine from the tiny model's weights."""
    from lachesis.trainer.engine.verl_engine import build_engine

    def build(*overrides: str, **more: Path) -> tuple[Engine, DictConfig]:
        config = configured(*overrides, **more)
        return build_engine(config), config

    return build


def pytest_configure(config: pytest.Config) -> None:
    for warning in (".* engine is not available:UserWarning", "Ray state API:DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lachesis.envs.arithmetic.base_model import ensure_base_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of seed 0 whose warm-up was cut short: it has the right shape and answers badly."""
    return ensure_base_model(tmp_path_factory.mktemp("models") / "tiny", 0, steps=20)


@pytest.fixture(scope="session")
def tiny(model_folder: Path) -> object:
    from completion_server import TinyModel

    return TinyModel(model_folder)


@pytest.fixture
def inference(tiny: object) -> Iterator[str]:
    """The address of an inference server of that model."""
    from completion_server import TinyModel, serving

    assert isinstance(tiny, TinyModel)
    tiny.calls.clear()
    tiny.authorizations.clear()
    with serving(tiny) as url:
        yield url

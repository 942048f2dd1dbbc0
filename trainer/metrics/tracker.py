"""Steps through verl's Tracking: console, file, TensorBoard, W&B and whatever else verl knows, under verl's names."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.nearest import did_you_mean
from lachesis.trainer.metrics.step import under_verls_names

# verl's backends and the module each needs
BACKENDS = {
    "console": "verl",
    "file": "verl",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "clearml": "clearml",
    "vemlp_wandb": "volcengine_ml_platform",
    "rl_insight": "rl_insight",
}


def check_backends(backends: Any) -> tuple[str, ...]:
    """The names in `lachesis.tracking`. Raises ConfigurationError for one that verl does not know or that lacks its package."""
    if isinstance(backends, str):
        backends = [backends]
    if not isinstance(backends, Sequence | None):
        raise ConfigurationError(f"lachesis.tracking = {backends!r}: must be a list, such as [console,tensorboard]")
    for name in backends or ():
        if name not in BACKENDS:
            raise ConfigurationError(
                f"lachesis.tracking: no backend {name!r}; verl has {', '.join(BACKENDS)}{did_you_mean(str(name), BACKENDS)}"
            )
        if importlib.util.find_spec(BACKENDS[name]) is None:
            raise ConfigurationError(
                f"lachesis.tracking: {name} needs a package that is not installed: pip install {BACKENDS[name]}"
            )
    return tuple(backends or ())


class Tracker:
    """`with Tracker(…) as tracker:` and `tracker.log` once a step; without backends it does nothing.

    What is written to files goes to `folder`, one file for each start, unless verl's own variables
    (VERL_FILE_LOGGER_PATH, TENSORBOARD_DIR) say where.
    """

    def __init__(
        self, backends: Sequence[str], *, project: str, name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        self._tracking: Any = None
        if not backends:
            return
        from verl.utils.tracking import Tracking

        if "file" in backends:
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(folder / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"))
        os.environ.setdefault("TENSORBOARD_DIR", str(folder / "tensorboard"))
        try:
            self._tracking = Tracking(project, name, list(backends), config=dict(config))
        except Exception as error:  # whatever a tracker's client raises, such as for want of a key
            raise ConfigurationError(f"lachesis.tracking = {list(backends)}: {' '.join(str(error).split())}") from error

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracking is not None:
            self._tracking.finish(exit_code=1 if error else 0)

    @property
    def active(self) -> bool:
        """Whether anybody is told."""
        return self._tracking is not None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One step's values, under our names."""
        if self._tracking is not None:
            self._tracking.log(under_verls_names(values), step)

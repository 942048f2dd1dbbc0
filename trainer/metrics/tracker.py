"""Steps through verl's Tracking: console, file, TensorBoard, W&B and whatever else verl knows, under verl's names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lachesis.broker.errors import ConfigurationError
from lachesis.trainer.config.compose import in_force
from lachesis.trainer.config.tracking_backends import check_backends
from lachesis.trainer.metrics.step import under_verls_names

if TYPE_CHECKING:
    pass


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


def open_tracker(config: DictConfig, *, run: str, policy: str, folder: Path) -> Tracker:
    """The trackers that the configuration names, told all of it that is read."""
    told, ours = OmegaConf.to_container(in_force(config), resolve=True), config.lachesis
    assert isinstance(told, dict)
    return Tracker(
        check_backends(ours.tracking),
        project=ours.wandb_project,
        name=f"{ours.wandb_group or run}-{policy}",
        folder=folder,
        config={str(node): values for node, values in told.items()} | {"trainer": {}},  # verl looks for a proxy there
    )

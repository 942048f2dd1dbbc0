"""The trackers that verl knows, and what each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from lachesis.broker.errors import ConfigurationError, did_you_mean

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

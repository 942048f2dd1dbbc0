"""One more trainer like those a run has: what they were told is kept with the run, and told again."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lachesis.broker import connect_blocking
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.registrations import KeptConfiguration
from lachesis.trainer.config.compose import override_name, resolved
from lachesis.trainer.config.plan import is_url
from lachesis.trainer.settings import TrainerSettings, quoted

FOLDERS = ("lachesis.weights_dir", "lachesis.checkpoint_dir")
MODEL = "actor_rollout_ref.model.path"
ITS_OWN = ("lachesis.replica", "lachesis.unverified_checkpoints")  # of each trainer, and of this start


def kept_configuration(settings: TrainerSettings, config: DictConfig) -> KeptConfiguration:
    """What to keep of a trainer, whose configuration is checked: it means the same in another folder."""
    given = [word for word in settings.overrides if override_name(word) not in ITS_OWN]
    return KeptConfiguration(tuple(map(_anywhere, given)), str(settings.state_dir.absolute()), resolved(config))


def like_run(settings: TrainerSettings) -> TrainerSettings:
    """The settings with what the run's trainer of that policy was told; what these say themselves wins.

    Raises ConfigurationError if the run knows of no such trainer.
    """
    policy = next((_value(word) for word in settings.overrides if override_name(word) == "lachesis.policy"), "main")
    with settings.redis(existing=True) as url, connect_blocking(url, settings.run) as broker:
        known = broker.call(broker.broker.registry.configurations)
    if policy not in known:
        there = f"it has {', '.join(sorted(known))}" if known else "it has none yet"
        raise ConfigurationError(
            f"--like-run: run {settings.run!r} has kept no configuration of policy {policy!r}; {there}"
        )
    kept, given = known[policy], {override_name(word) for word in settings.overrides}
    told = [word for word in kept.overrides if override_name(word) not in given]
    changed: dict[str, object] = {"overrides": [*told, *settings.overrides], "like_run": False}
    if kept.state_dir and "state_dir" not in settings.model_fields_set:
        changed["state_dir"] = Path(kept.state_dir)
    return settings.model_copy(update=changed)


def _anywhere(override: str) -> str:
    """The override with a whole path where it names a folder."""
    name, value = override_name(override), _value(override)
    is_folder = name in FOLDERS or (name == MODEL and Path(value).expanduser().is_dir())
    if not is_folder or value in ("", "null") or is_url(value) or value.startswith("file://"):
        return override
    return f"{name}={quoted(str(Path(value).expanduser().absolute()))}"


def _value(override: str) -> str:
    value = override.partition("=")[2]
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace(f"\\{value[0]}", value[0])
    return value

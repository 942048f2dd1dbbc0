"""The trainer's configuration: composed by Hydra, checked before anything expensive starts, and refused in one line."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lachesis.broker.errors import ConfigurationError, did_you_mean
from lachesis.trainer.config.rules import NUMBER, check_rules

READ = (
    *("lachesis.", "actor_rollout_ref.model.", "actor_rollout_ref.actor.", "actor_rollout_ref.ref.", "algorithm."),
    "distillation.distillation_loss.",
)
GROUPS = ("device", "algo", "correction")  # folders of presets in config/
READ_TOO = ("actor_rollout_ref.rollout.temperature", "distillation.enabled")
NOT_READ = {  # in those nodes, and why
    **dict.fromkeys(
        (f"actor_rollout_ref.actor.{name}" for name in ("ppo_epochs", "ppo_mini_batch_size", "shuffle")),
        "one step is one pass over one batch",
    ),
    "actor_rollout_ref.model.lora.": "LoRA is set by model.lora_rank, lora_alpha, target_modules; versions are published merged",
}
INSTEAD = {  # what does here what verl's own drivers do by these
    "trainer.logger": "lachesis.tracking",
    "trainer.project_name": "lachesis.wandb_project",
    "trainer.experiment_name": "lachesis.wandb_group",
    "trainer.total_training_steps": "lachesis.num_steps",
    "trainer.save_freq": "lachesis.checkpoint_every",
    "trainer.default_local_dir": "lachesis.checkpoint_dir",
    "data.train_batch_size": "lachesis.batch_size",
    "data.max_prompt_length": "lachesis.max_token_len",
    "data.max_response_length": "lachesis.max_token_len",
    "data.seed": "lachesis.seed",
}
OPEN = "override_"  # nodes of such names take keys of whatever they are handed on to


def compose_config(overrides: Sequence[str], *, device: str) -> DictConfig:
    """Compose trainer.yaml with `overrides`; `device` (cpu or cuda) is used unless they choose one."""
    for override in overrides:
        name = override_name(override)
        if name in INSTEAD:
            raise ConfigurationError(f"{name}: not read by this trainer; {INSTEAD[name]} takes its place")
        if override.startswith("~"):
            raise ConfigurationError(f"{override}: what the trainer reads can't be removed; give {name} another value")
        reason = next((reason for prefix, reason in NOT_READ.items() if name.startswith(prefix)), None)
        if reason is None and f"{name}.".startswith(READ) and not name.startswith(READ):
            reason = "give each of its settings by its full name"
        if reason is None and not (name.startswith(READ) or name in (*READ_TOO, *GROUPS)):
            reason = f"rollouts come from Redis; it reads {', '.join((*GROUPS, *READ, *READ_TOO))}"
        if reason:
            raise ConfigurationError(f"{name}: not read by this trainer ({reason})")
    verl = importlib.util.find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        raise ConfigurationError("verl is not installed: pip install 'lachesis-rl[trainer]'")
    # where trainer.yaml's pkg://verl.trainer.config lies, without the seconds that importing verl takes
    searchpath = f"hydra.searchpath=[file://{verl.submodule_search_locations[0]}/trainer/config]"
    chosen = (searchpath, f"device={device}", *(word for word in overrides if word.split("=", 1)[0] in GROUPS))
    try:
        config = copy.deepcopy(_compose(chosen))
        default = _leaves(in_force(config))
        for override in overrides:
            _check_known(override_name(override), default)
        _apply(config, [word for word in overrides if word not in chosen])
        OmegaConf.resolve(config.lachesis)
        check_rules(config)
        _check_kinds(default, _leaves(in_force(config)))
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error).split("Config search path")[0].split("See https://")[0]  # which is of Hydra's inner life
        raise ConfigurationError(" ".join(said.split())) from None
    return config


@functools.lru_cache(maxsize=8)
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_module("lachesis.trainer.config", version_base=None):
        config: DictConfig = compose("trainer", overrides=list(overrides))
    return config


def _apply(config: DictConfig, overrides: Sequence[str]) -> None:
    """As Hydra's compose does it, which reads all files again for that: a second."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            raise ConfigurationError(f"{override.input_line}: several values; as a list they are written [a,b]")
        added = override.is_add() or override.is_force_add()
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=added)


def in_force(config: DictConfig) -> DictConfig:
    """The nodes that are read."""
    model, actor, ref, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "ref", "rollout"))
    theirs = {"model": model, "actor": actor, "ref": ref, "rollout": {"temperature": rollout.temperature}}
    distillation = {name: config.distillation[name] for name in ("enabled", "distillation_loss")}
    nodes = {"actor_rollout_ref": theirs, "algorithm": config.algorithm, "distillation": distillation}
    return OmegaConf.create({"lachesis": config.lachesis, **nodes})


def resolved(config: DictConfig) -> str:
    """The nodes that are read, as YAML."""
    return OmegaConf.to_yaml(in_force(config), resolve=True)


def _leaves(config: DictConfig) -> dict[str, Any]:
    """Values by their full names."""

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return dict(walk(found, ""))


def override_name(override: str) -> str:
    """The setting, or group of presets, that an override is of."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


def _check_known(name: str, default: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for a name that nothing would read, also if it was added with a +."""
    if name in (*GROUPS, *default) or f".{OPEN}" in name or any(known.startswith(f"{name}.") for known in default):
        return
    parent = name.rpartition(".")[0]
    beside = {known.removeprefix(f"{parent}.").split(".")[0] for known in default if known.startswith(f"{parent}.")}
    meant = did_you_mean(name.rpartition(".")[2], beside).replace("'", f"'{parent}.", 1)
    raise ConfigurationError(f"{name}: no such setting, so nothing would read it{meant}")


def _check_kinds(default: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for a value of another kind than the default's; those of ours have rules of their own."""
    for name in default.keys() - chosen.keys():
        if f".{OPEN}" not in name:
            raise ConfigurationError(f"{name}: it is needed, and what holds it was given another value")
    for name, value in chosen.items():
        before = default.get(name)
        if not name.startswith("lachesis.") and (kind := _kind(before)) and not _is_like(name, value, before):
            raise ConfigurationError(f"{name} = {value!r}: must be {kind}, as its default, {before!r}")


def _kind(value: Any) -> str:
    return {bool: "true or false", int: "a number", float: "a number", str: "a text"}.get(type(value), "")


def _is_like(name: str, value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool | None)
    if isinstance(default, NUMBER):  # some thresholds are ranges, as texts
        return (isinstance(value, NUMBER | None) and not isinstance(value, bool)) or name.endswith("_threshold")
    return isinstance(value, str | list | None) or name.endswith("_threshold")

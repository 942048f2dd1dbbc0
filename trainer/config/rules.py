"""The rules of the node `lachesis` of the configuration, each with the words that refuse a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from omegaconf import DictConfig

from lachesis.broker.errors import ConfigurationError

Backend: TypeAlias = Literal["gloo", "nccl"]

DTYPES = ("fp32", "bf16", "fp16")

SUM_DTYPES = ("fp32", "fp64")

SHADOWS = ("off", "lossless", "lossy")


def _whole(least: int, note: str = "") -> tuple[Callable[[Any], bool], str]:
    rule = f"must be a whole number of at least {least}" if least else f"must be a whole number; {note}"
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least, rule


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, f"must be one of {', '.join(choices)}"


TEXT = (lambda value: isinstance(value, str), "must be a text")

TEXT_OR_NULL = (lambda value: value is None or isinstance(value, str), "must be a text, or null")

FLAG = (lambda value: isinstance(value, bool), "must be true or false")

NUMBER = int | float

RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # of the node `lachesis`
    **dict.fromkeys(("batch_size", "num_steps", "publish_every", "checkpoint_every", "keep_versions"), _whole(1)),
    **dict.fromkeys(("full_every", "max_behind"), _whole(1)),
    "prefetch": (lambda value: value in (0, 1) and not isinstance(value, bool), "must be 0 or 1"),
    **dict.fromkeys(("lockstep", "elastic", "unverified_checkpoints"), FLAG),
    "shadow": _one_of(*SHADOWS),
    "lease_s": (
        lambda value: isinstance(value, NUMBER) and not isinstance(value, bool) and value >= 1,
        "must be at least 1 second",
    ),
    "max_deliveries": _whole(0, "0 for no limit"),
    "examples_every": _whole(0, "0 for none"),
    "seed": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32,
        "must be a whole number from 0 to 4294967295",
    ),
    "weights_dtype": _one_of(*DTYPES),
    "elastic_dtype": _one_of(*SUM_DTYPES),
    "elastic_over": _one_of(*get_args(Backend)),
    **dict.fromkeys(("policy", "wandb_project"), TEXT),
    **dict.fromkeys(("replica", "weights_dir", "checkpoint_dir", "wandb_group"), TEXT_OR_NULL),
}


def check_rules(config: DictConfig) -> None:
    for name, (fits, rule) in RULES.items():
        if not fits(value := config.lachesis[name]):
            raise ConfigurationError(f"lachesis.{name} = {value!r}: {rule}")
    if not isinstance(path := config.actor_rollout_ref.model.path, str | None):
        raise ConfigurationError(
            f"actor_rollout_ref.model.path = {path!r}: must be a folder, or a Hugging Face model's name"
        )

"""The trainer's configuration: composed by Hydra, checked before anything expensive starts, and refused in one line."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.nearest import did_you_mean
from lachesis.broker.records.groups import KeptConfiguration
from lachesis.broker.records.keys import check_name
from lachesis.broker.retention.shadows import Rule
from lachesis.service.settings import RedisSettings
from lachesis.trainer.config.algorithms import check_algorithm, check_elastic, settle_algorithm
from lachesis.trainer.elastic.config import Over
from lachesis.trainer.metrics.tracker import check_backends

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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHT_FILES = ("*.safetensors", "*.bin")
DTYPES = ("fp32", "bf16", "fp16")
SUM_DTYPES = ("fp32", "fp64")
SHADOWS = ("off", "lossless", "lossy")
OPEN = "override_"  # nodes of such names take keys of whatever they are handed on to


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
    "elastic_over": _one_of(*get_args(Over)),
    **dict.fromkeys(("policy", "wandb_project"), TEXT),
    **dict.fromkeys(("replica", "weights_dir", "checkpoint_dir", "wandb_group"), TEXT_OR_NULL),
}


@dataclass(frozen=True)
class Plan:
    """The node `lachesis` of the configuration, resolved for one run."""

    run: str
    policy: str
    shadow: Rule | None  # how it reads along with the policy that environments know; None: it is that one
    replica: str
    model_dir: Path
    batch_size: int
    max_token_len: int
    num_steps: int
    prefetch: int  # batches made ready while one trains: 0 or 1
    lockstep: bool  # whether environments wait for the version trained from a batch before they make the next
    publish_every: int
    checkpoint_every: int
    keep_versions: int
    weights_dir: Path  # of this run and policy
    weights_url: str  # where agents fetch the versions, of this run and policy; empty: from weights_dir
    full_every: int  # there: versions from one that lies whole to the next; those between as differences
    weights_dtype: str
    checkpoint_dir: Path  # of this run and policy
    lease_s: float
    elastic: bool  # whether replicas train each step together
    elastic_over: Over  # what their sums go over
    exact: bool  # whether their sums are the same bit for bit, however many they are
    max_deliveries: int
    temperature: float
    examples_every: int  # steps; 0: no examples
    tracking: tuple[str, ...]  # verl's backends
    tracking_dir: Path  # of this run and policy
    wandb_project: str
    wandb_group: str
    unverified_checkpoints: bool = False  # whether one that Redis does not know is loaded, too
    kept: KeptConfiguration | None = None  # told to the run when this trainer begins


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
        _check_rules(config)
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


def _check_rules(config: DictConfig) -> None:
    for name, (fits, rule) in RULES.items():
        if not fits(value := config.lachesis[name]):
            raise ConfigurationError(f"lachesis.{name} = {value!r}: {rule}")
    if not isinstance(path := config.actor_rollout_ref.model.path, str | None):
        raise ConfigurationError(
            f"actor_rollout_ref.model.path = {path!r}: must be a folder, or a Hugging Face model's name"
        )


def check_config(config: DictConfig) -> None:
    """Raise ConfigurationError for what can't work, whatever the model."""
    ours = config.lachesis
    _check_rules(config)
    check_name("lachesis.policy", ours.policy)
    if ours.replica is not None:
        check_name("lachesis.replica", ours.replica)
    if ours.shadow != "off" and ours.policy == "main":
        raise ConfigurationError(
            f"lachesis.shadow = {ours.shadow!r}: give the shadow a name of its own with lachesis.policy=NAME; 'main' is what it "
            "trains along with"
        )
    if ours.full_every > 1 and not is_url(ours.weights_dir):
        raise ConfigurationError(
            f"lachesis.full_every = {ours.full_every!r}: versions in a folder are always whole; it needs a URL as "
            "lachesis.weights_dir"
        )
    if is_url(ours.checkpoint_dir):
        raise ConfigurationError(
            f"lachesis.checkpoint_dir = {ours.checkpoint_dir!r}: must be a folder; only lachesis.weights_dir may be a URL"
        )
    temperature = config.actor_rollout_ref.rollout.temperature
    if isinstance(temperature, bool) or not isinstance(temperature, NUMBER) or not temperature > 0:
        raise ConfigurationError(f"actor_rollout_ref.rollout.temperature = {temperature!r}: must be above 0")
    check_algorithm(config)
    _check_device(config)
    if ours.elastic_over == "nccl" and ours.device != "cuda":
        raise ConfigurationError("lachesis.elastic_over = 'nccl': needs a GPU (device=cuda); without one it is gloo")
    if ours.elastic:
        check_elastic(config)
    check_backends(ours.tracking)


def longest_sequence(config: DictConfig, positions: int) -> int:
    """The most tokens of a sequence that is taken, by a model of so many positions. Raises ConfigurationError."""
    ours, longest = config.lachesis, min(positions, config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu)
    given = ours.max_token_len
    if given is None:
        return int(longest)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 < given <= longest:
        raise ConfigurationError(
            f"lachesis.max_token_len = {given!r}: must be from 1 to {longest}, what the model and one "
            "micro-batch (actor_rollout_ref.actor.ppo_max_token_len_per_gpu) can hold"
        )
    return given


def make_plan(config: DictConfig, settings: RedisSettings) -> Plan:
    """Check everything that can be checked without building the engine. The model's path in `config` becomes local."""
    ours = config.lachesis
    check_config(config)
    if not config.actor_rollout_ref.model.path:
        raise ConfigurationError(
            "which model? Give actor_rollout_ref.model.path=FOLDER, or a Hugging Face model's name"
        )
    model_dir = find_model(config.actor_rollout_ref.model.path)
    config.actor_rollout_ref.model.path = str(model_dir)
    longest = longest_sequence(config, max_positions(model_dir))
    settle_algorithm(config, longest)
    policy = ours.policy
    place = Path(settings.run, policy)
    weights_dir = str(ours.weights_dir or settings.state_dir / "weights").removeprefix("file://")
    weights_url = weights_dir.rstrip("/") if is_url(weights_dir) else ""
    return Plan(
        run=settings.run,
        policy=policy,
        shadow=None if ours.shadow == "off" else Rule(ours.shadow, ours.max_behind),
        replica=ours.replica or check_name("lachesis.replica", socket.gethostname()),
        model_dir=model_dir,
        batch_size=ours.batch_size,
        max_token_len=longest,
        num_steps=ours.num_steps,
        prefetch=ours.prefetch,
        lockstep=ours.lockstep,
        publish_every=ours.publish_every,
        checkpoint_every=ours.checkpoint_every,
        keep_versions=ours.keep_versions,
        weights_dir=Path(settings.state_dir / "weights" if weights_url else weights_dir).absolute() / place,
        weights_url=weights_url and f"{weights_url}/{settings.run}/{policy}",
        full_every=ours.full_every,
        weights_dtype=ours.weights_dtype,
        checkpoint_dir=Path(ours.checkpoint_dir or settings.state_dir / "checkpoints").absolute() / place,
        lease_s=float(ours.lease_s),
        elastic=ours.elastic,
        elastic_over=ours.elastic_over,
        exact=ours.elastic_dtype == "fp64",
        max_deliveries=ours.max_deliveries,
        temperature=float(config.actor_rollout_ref.rollout.temperature),
        examples_every=ours.examples_every,
        tracking=check_backends(ours.tracking),
        tracking_dir=settings.state_dir.absolute() / "tracking" / place,
        wandb_project=ours.wandb_project,
        wandb_group=ours.wandb_group or settings.run,
        unverified_checkpoints=ours.unverified_checkpoints,
    )


def find_model(path: str) -> Path:
    """The folder of a model that is on this machine, or a name that the Hugging Face hub knows; checked."""
    where = f"actor_rollout_ref.model.path = {path!r}"
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise ConfigurationError(f"{where}: {error}") from None
    if not folder.is_dir():
        folder = _from_hub(path)
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{where}: holds no config.json, so it is not a Hugging Face model folder")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigurationError(
            f"{where}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "save it there with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ConfigurationError(f"{where}: holds no weights (none of {', '.join(WEIGHT_FILES)})")
    return folder.absolute()


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ConfigurationError(f"actor_rollout_ref.model.path = {name!r}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.pth", "*.gguf", "*.onnx", "original/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"actor_rollout_ref.model.path = {name!r}: no such folder, and not to be had from the Hugging Face hub "
            f"({type(error).__name__})"
        ) from error


def is_url(place: object) -> bool:
    """Whether it names a place that is not a folder of this machine."""
    return "://" in str(place) and not str(place).startswith("file://")


def _check_device(config: DictConfig) -> None:
    actor = config.actor_rollout_ref.actor
    on_cpu = config.lachesis.device == "cpu"
    if on_cpu and actor.strategy != "fsdp2":
        raise ConfigurationError(
            f"actor_rollout_ref.actor.strategy = {actor.strategy!r}: without an accelerator only fsdp2 works"
        )
    attention = config.actor_rollout_ref.model.override_config.attn_implementation
    if on_cpu and attention.startswith("flash"):
        raise ConfigurationError(
            f"actor_rollout_ref.model.override_config.attn_implementation = {attention!r}: needs an accelerator; use sdpa"
        )


def max_positions(model_dir: Path) -> int:
    """The most tokens of a sequence that the model in the folder takes."""
    where = f"actor_rollout_ref.model.path = {str(model_dir)!r}"
    try:
        raw = json.loads((model_dir / "config.json").read_text())
        text = raw.get("text_config") or raw
        return int(text.get("max_position_embeddings") or raw.get("n_positions") or 1 << 30)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{where}: its config.json can't be read: {error}") from None

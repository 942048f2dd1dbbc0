"""The trainer's configuration: composed by Hydra, checked before anything expensive starts, and refused in one line."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.keys import check_name
from lachesis.broker.shadows import Rule
from lachesis.trainer.algorithms import check_algorithm, check_elastic, settle_algorithm
from lachesis.trainer.duties import Over
from lachesis.trainer.settings import TrainerSettings
from lachesis.trainer.tracking import check_backends

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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHT_FILES = ("*.safetensors", "*.bin")
DTYPES = ("fp32", "bf16", "fp16")
SUM_DTYPES = ("fp32", "fp64")
SHADOWS = ("off", "lossless", "lossy")


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


def compose_config(overrides: Sequence[str], *, device: str) -> DictConfig:
    """Compose trainer.yaml with `overrides`; `device` (cpu or cuda) is used unless they choose one."""
    for override in overrides:
        name = override.split("=", 1)[0].lstrip("+~").split("@")[0]
        reason = next((reason for prefix, reason in NOT_READ.items() if name.startswith(prefix)), None)
        if reason is None and not (name.startswith(READ) or name in (*READ_TOO, *GROUPS)):
            reason = f"rollouts come from Redis; it reads {', '.join((*GROUPS, *READ, *READ_TOO))}"
        if reason:
            raise ConfigurationError(f"{name}: not read by this trainer ({reason})")
    verl = importlib.util.find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        raise ConfigurationError("verl is not installed: pip install 'lachesis-rl[trainer]'")
    # where trainer.yaml's pkg://verl.trainer.config lies, without the seconds that importing verl takes
    searchpath = f"hydra.searchpath=[file://{verl.submodule_search_locations[0]}/trainer/config]"
    try:
        with initialize_config_module("lachesis.trainer.config", version_base=None):
            config: DictConfig = compose("trainer", overrides=[searchpath, f"device={device}", *overrides])
        OmegaConf.resolve(config.lachesis)
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error).split("Config search path")[0]  # which is of Hydra's inner life
        raise ConfigurationError(" ".join(said.split())) from None
    return config


def make_plan(config: DictConfig, settings: TrainerSettings) -> Plan:
    """Check everything that can be checked without building the engine. The model's path in `config` becomes local."""
    ours, actor = config.lachesis, config.actor_rollout_ref.actor
    for name in (
        "batch_size",
        "num_steps",
        "publish_every",
        "checkpoint_every",
        "keep_versions",
        "full_every",
        "max_behind",
    ):
        if not isinstance(ours[name], int) or ours[name] < 1:
            raise ConfigurationError(f"lachesis.{name} = {ours[name]!r}: must be a whole number of at least 1")
    if ours.prefetch not in (0, 1):
        raise ConfigurationError(f"lachesis.prefetch = {ours.prefetch!r}: must be 0 or 1")
    if not isinstance(ours.lockstep, bool):
        raise ConfigurationError(f"lachesis.lockstep = {ours.lockstep!r}: must be true or false")
    if ours.shadow not in SHADOWS:
        raise ConfigurationError(f"lachesis.shadow = {ours.shadow!r}: must be one of {', '.join(SHADOWS)}")
    if ours.shadow != "off" and ours.policy == "main":
        raise ConfigurationError(
            f"lachesis.shadow = {ours.shadow!r}: give the shadow a name of its own with lachesis.policy=NAME; 'main' is what it "
            "trains along with"
        )
    if not ours.lease_s >= 1:
        raise ConfigurationError(f"lachesis.lease_s = {ours.lease_s!r}: must be at least 1 second")
    for name, zero in (("max_deliveries", "for no limit"), ("examples_every", "for none")):
        if not isinstance(ours[name], int) or ours[name] < 0:
            raise ConfigurationError(f"lachesis.{name} = {ours[name]!r}: must be a whole number; 0 {zero}")
    if ours.weights_dtype not in DTYPES:
        raise ConfigurationError(f"lachesis.weights_dtype = {ours.weights_dtype!r}: must be one of {', '.join(DTYPES)}")
    if ours.full_every > 1 and not is_url(ours.weights_dir):
        raise ConfigurationError(
            f"lachesis.full_every = {ours.full_every!r}: versions in a folder are always whole; it needs a URL as "
            "lachesis.weights_dir"
        )
    if is_url(ours.checkpoint_dir):
        raise ConfigurationError(
            f"lachesis.checkpoint_dir = {ours.checkpoint_dir!r}: must be a folder; only lachesis.weights_dir may be a URL"
        )
    check_algorithm(config)
    if ours.elastic_dtype not in SUM_DTYPES:
        raise ConfigurationError(
            f"lachesis.elastic_dtype = {ours.elastic_dtype!r}: must be one of {', '.join(SUM_DTYPES)}"
        )
    _check_device(config)
    temperature = config.actor_rollout_ref.rollout.temperature
    if not temperature > 0:
        raise ConfigurationError(f"actor_rollout_ref.rollout.temperature = {temperature!r}: must be above 0")

    if not config.actor_rollout_ref.model.path:
        raise ConfigurationError(
            "which model? Give actor_rollout_ref.model.path=FOLDER, or a Hugging Face model's name"
        )
    model_dir = find_model(config.actor_rollout_ref.model.path)
    config.actor_rollout_ref.model.path = str(model_dir)
    longest = min(_max_positions(model_dir), actor.ppo_max_token_len_per_gpu)
    if ours.max_token_len is not None and not 0 < ours.max_token_len <= longest:
        raise ConfigurationError(
            f"lachesis.max_token_len = {ours.max_token_len!r}: must be from 1 to {longest}, what the model and one "
            "micro-batch (actor_rollout_ref.actor.ppo_max_token_len_per_gpu) can hold"
        )
    settle_algorithm(config, ours.max_token_len or longest)
    if ours.elastic_over not in get_args(Over):
        raise ConfigurationError(
            f"lachesis.elastic_over = {ours.elastic_over!r}: must be one of {', '.join(get_args(Over))}"
        )
    if ours.elastic_over == "nccl" and ours.device != "cuda":
        raise ConfigurationError("lachesis.elastic_over = 'nccl': needs a GPU (device=cuda); without one it is gloo")
    if ours.elastic:
        check_elastic(config)
    policy = check_name("lachesis.policy", ours.policy)
    place = Path(settings.run, policy)
    weights_dir = str(ours.weights_dir or settings.state_dir / "weights").removeprefix("file://")
    weights_url = weights_dir.rstrip("/") if is_url(weights_dir) else ""
    return Plan(
        run=settings.run,
        policy=policy,
        shadow=None if ours.shadow == "off" else Rule(ours.shadow, ours.max_behind),
        replica=check_name("lachesis.replica", ours.replica or socket.gethostname()),
        model_dir=model_dir,
        batch_size=ours.batch_size,
        max_token_len=ours.max_token_len or longest,
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
        temperature=float(temperature),
        examples_every=ours.examples_every,
        tracking=check_backends(ours.tracking),
        tracking_dir=settings.state_dir.absolute() / "tracking" / place,
        wandb_project=ours.wandb_project,
        wandb_group=ours.wandb_group or settings.run,
    )


def find_model(path: str) -> Path:
    """The folder of a model that is on this machine, or a name that the Hugging Face hub knows; checked."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _from_hub(path)
    where = f"actor_rollout_ref.model.path = {path!r}"
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


def _max_positions(model_dir: Path) -> int:
    raw: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return int((raw.get("text_config") or raw).get("max_position_embeddings") or raw.get("n_positions") or 1 << 30)

"""The trainer's configuration: sound defaults, verl's names, and one line for what can't work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf
from trainer_kit import start_trainer

from lachesis.broker import ConfigurationError, EmbeddedRedis
from lachesis.trainer.configure import compose_config, find_model, make_plan
from lachesis.trainer.settings import TrainerSettings, explain_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

Configured = Callable[..., "DictConfig"]


@pytest.mark.parametrize(
    ("given", "folder", "url"),
    [
        ("ftp://store/w/", "state/weights", "ftp://store/w/r1/main"),
        ("file:///store/w", "/store/w", ""),
        ("/store/w", "/store/w", ""),
    ],
)
def test_where_versions_go(configured: Configured, tmp_path: Path, given: str, folder: str, url: str) -> None:
    settings = TrainerSettings(state_dir=tmp_path / "state", run="r1")
    plan = make_plan(configured(f"lachesis.weights_dir={given}"), settings)
    assert (plan.weights_dir, plan.weights_url) == (tmp_path / folder / "r1/main", url)


def test_what_only_a_url_or_only_a_folder_can_be(configured: Configured, tmp_path: Path) -> None:
    settings = TrainerSettings(state_dir=tmp_path, run="r1")
    with pytest.raises(ConfigurationError, match=r"lachesis.full_every = 8: .* needs a URL"):
        make_plan(configured("lachesis.full_every=8"), settings)
    with pytest.raises(ConfigurationError, match=r"lachesis.checkpoint_dir = 's3://b/c': must be a folder"):
        make_plan(configured("lachesis.checkpoint_dir=s3://b/c"), settings)


def test_without_an_accelerator(configured: Configured, tiny_model: Path, tmp_path: Path) -> None:
    config = configured()
    plan = make_plan(config, TrainerSettings(state_dir=tmp_path, run="r1"))
    assert plan.weights_dir == tmp_path / "weights/r1/main"
    assert plan.checkpoint_dir == tmp_path / "checkpoints/r1/main"
    assert (plan.weights_dtype, plan.max_token_len, plan.wandb_group) == (
        "fp32",
        128,
        "r1",
    )  # the model's 128 positions
    assert plan.model_dir == tiny_model
    actor = config.actor_rollout_ref.actor
    assert (actor.strategy, actor.fsdp_config.mixed_precision.param_dtype) == ("fsdp2", "fp32")
    assert (actor.use_torch_compile, actor.clip_ratio_high, actor.loss_agg_mode) == (False, 0.2, "token-mean")
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"
    correction = config.algorithm.rollout_correction
    assert (correction.rollout_is, correction.rollout_is_threshold, correction.bypass_mode) == ("token", 2.0, False)


def test_with_an_accelerator(tiny_model: Path, tmp_path: Path) -> None:
    config = compose_config([f"actor_rollout_ref.model.path={tiny_model}"], device="cuda")
    assert make_plan(config, TrainerSettings(state_dir=tmp_path)).weights_dtype == "bf16"
    precision = config.actor_rollout_ref.actor.fsdp_config
    assert (precision.model_dtype, precision.mixed_precision.param_dtype) == ("fp32", "bf16")
    assert precision.use_torch_compile


def test_verl_accepts_the_configuration(configured: Configured) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    actor = omega_conf_to_dataclass(configured().actor_rollout_ref.actor)
    assert (type(actor).__name__, actor.optim.lr, actor.optim.total_training_steps) == ("FSDPActorConfig", 1e-2, 100)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lachesis.batch_size", 0, "lachesis.batch_size = 0: must be a whole number of at least 1"),
        ("lachesis.publish_every", 0, "lachesis.publish_every = 0"),
        ("lachesis.num_steps", "many", "lachesis.num_steps = 'many'"),
        ("lachesis.lease_s", 0.1, "lachesis.lease_s = 0.1"),
        ("lachesis.max_deliveries", -1, "lachesis.max_deliveries = -1"),
        ("lachesis.examples_every", -1, "lachesis.examples_every = -1: must be a whole number; 0 for none"),
        ("lachesis.prefetch", 2, "lachesis.prefetch = 2: must be 0 or 1"),
        ("lachesis.lockstep", "yes", "lachesis.lockstep = 'yes': must be true or false"),
        ("lachesis.tracking", ["visdom"], "lachesis.tracking: no backend 'visdom'"),
        ("lachesis.policy", "a b", "lachesis.policy = 'a b'"),
        ("lachesis.weights_dtype", "int4", "must be one of fp32, bf16, fp16"),
        ("lachesis.elastic_dtype", "bf16", "must be one of fp32, fp64"),
        ("lachesis.elastic_over", "mpi", "must be one of gloo, nccl"),
        ("lachesis.elastic_over", "nccl", "needs a GPU (device=cuda)"),
        ("lachesis.max_token_len", 129, "must be from 1 to 128"),
        ("actor_rollout_ref.rollout.temperature", 0, "must be above 0"),
        ("actor_rollout_ref.model.path", "/no/such/folder", "'/no/such/folder': no such folder"),
        ("actor_rollout_ref.actor.strategy", "fsdp", "only fsdp2 works"),
        ("actor_rollout_ref.model.override_config.attn_implementation", "flash_attention_2", "needs an accelerator"),
        ("algorithm.adv_estimator", "gae", "needs a critic"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    configured: Configured, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    config = configured()
    OmegaConf.update(config, key, value)
    with pytest.raises(ConfigurationError) as refusal:
        make_plan(config, TrainerSettings(state_dir=tmp_path))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lachesis.batchsize=3", "batchsize"),
        ("actor_rollout_ref.actor.optim.learning_rate=1", "learning_rate"),
        ("trainer.total_epochs=3", "trainer.total_epochs: not read by this trainer"),
        ("actor_rollout_ref.actor.ppo_epochs=2", "actor_rollout_ref.actor.ppo_epochs: not read by this trainer"),
        ("actor_rollout_ref.model.lora.rank=8", "LoRA is set by model.lora_rank"),
        ("lachesis.num_steps", "lachesis.num_steps"),
        ("device=tpu", "device/tpu"),
    ],
)
def test_overrides_that_would_do_nothing_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        compose_config([override], device="cpu")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "holds no tokenizer"),
        ("model.safetensors", "holds no weights"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tiny_model: Path, tmp_path: Path, missing: str, message: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / missing).unlink()
    with pytest.raises(ConfigurationError, match=message):
        find_model(str(folder))


def test_which_model_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="which model"):
        make_plan(compose_config([], device="cpu"), TrainerSettings(state_dir=tmp_path))


@pytest.mark.verl
def test_values_that_verl_refuses_are_one_line(configured: Configured) -> None:
    from lachesis.trainer.engine import build_engine

    config = configured("actor_rollout_ref.actor.loss_agg_mode=sum")
    with pytest.raises(
        ConfigurationError, match=r"verl refuses the configuration: .*Invalid loss_agg_mode: sum"
    ) as refusal:
        build_engine(config)
    assert "\n" not in str(refusal.value)


def test_the_configuration_can_be_printed(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lachesis.trainer.main import run

    for overrides in ([f"actor_rollout_ref.model.path={tiny_model}"], []):  # also before there is a model
        settings = TrainerSettings(state_dir=tmp_path, overrides=["lachesis.num_steps=7", *overrides], cfg="job")
        assert run(settings) == 0
        printed = OmegaConf.create(capsys.readouterr().out)
        assert printed.lachesis.num_steps == printed.actor_rollout_ref.actor.optim.total_training_steps == 7
        assert list(tmp_path.iterdir()) == []


@pytest.mark.verl
def test_a_dry_run_writes_the_resolved_configuration_and_says_where(
    shared_redis: EmbeddedRedis, tiny_model: Path, tmp_path: Path
) -> None:
    overrides = [f"actor_rollout_ref.model.path={tiny_model}", "lachesis.num_steps=7", "lachesis.policy=p"]
    process = start_trainer(shared_redis.url, "dry", tmp_path, overrides, dry_run=True)
    process.join(60)
    assert process.exitcode == 0
    written = tmp_path / "runs/dry/trainer-p.yaml"
    assert OmegaConf.load(written).actor_rollout_ref.actor.optim.total_training_steps == 7
    assert str(written) in (tmp_path / "trainer.log").read_text()


def test_help_explains_every_setting_of_ours() -> None:
    explained = explain_overrides()
    for name in compose_config([], device="cpu").lachesis:
        assert f"    {name}: " in explained, name
    assert re.search(r"device=NAME +a preset, one of\n +cpu, cuda", explained)

"""The trainer's configuration: sound defaults, verl's names, and one line for what can't work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf
from trainer_kit import PATIENCE_S, start_trainer

from lachesis.broker import BlockingBroker, ConfigurationError, EmbeddedRedis
from lachesis.cli.main import main
from lachesis.trainer.config.algorithms import ESTIMATORS, LOSSES, REJECTIONS
from lachesis.trainer.config.compose import compose_config
from lachesis.trainer.config.like_run import kept_configuration, like_run
from lachesis.trainer.config.model import find_model
from lachesis.trainer.config.plan import check_config, make_plan
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
    from lachesis.trainer.engine.verl_engine import build_engine

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


def test_lists_with_commas_are_overrides_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    lists = ["lachesis.tracking=[tensorboard,file]", "actor_rollout_ref.model.target_modules=[q_proj,v_proj]"]
    assert main(["trainer", lists[0], "--cfg", "job", lists[1]]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.lachesis.tracking == ["tensorboard", "file"]
    assert printed.actor_rollout_ref.model.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+lachesis.nosuch=1", "lachesis.nosuch: no such setting, so nothing would read it"),
        ("++algorithm.nosuch=1", "algorithm.nosuch: no such setting"),
        ("lachesis.batchsize=1", "did you mean 'lachesis.batch_size'?"),
        ("~lachesis.seed", "can't be removed"),
        ("trainer.logger=[console]", "trainer.logger: not read by this trainer; lachesis.tracking takes its place"),
        ("actor_rollout_ref.actor={}", "give each of its settings by its full name"),
        ("lachesis.seed=abc", "lachesis.seed = 'abc': must be a whole number"),
        ("lachesis.lease_s=soon", "lachesis.lease_s = 'soon': must be at least 1 second"),
        ("lachesis.elastic=maybe", "lachesis.elastic = 'maybe': must be true or false"),
        ("lachesis.batch_size=true", "lachesis.batch_size = True: must be a whole number"),
        ("lachesis.policy=5", "lachesis.policy = 5: must be a text"),
        ("lachesis.tracking=5", "lachesis.tracking = 5: must be a list"),
        ("actor_rollout_ref.actor.optim.lr=abc", "optim.lr = 'abc': must be a number, as its default, 1e-06"),
        ("actor_rollout_ref.model.path=5", "actor_rollout_ref.model.path = 5: must be a folder"),
        ("algorithm.rollout_correction.rollout_rs=seq_men_k1", "did you mean 'seq_mean_k1'?"),
    ],
)
def test_a_name_or_a_value_that_nothing_can_read_is_refused_before_there_is_a_model(
    override: str, message: str
) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_config(compose_config([override], device="cpu"))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_handed_on_takes_any_name() -> None:
    config = compose_config(["+actor_rollout_ref.model.override_config.rope_theta=1e6"], device="cpu")
    assert config.actor_rollout_ref.model.override_config.rope_theta == 1e6


@pytest.mark.verl
def test_the_names_known_without_verl_are_verls() -> None:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    from verl.trainer.ppo.rollout_corr_helper import SUPPORTED_ROLLOUT_RS_OPTIONS

    assert set(ESTIMATORS) == set(ADV_ESTIMATOR_REGISTRY)
    assert set(LOSSES) == set(POLICY_LOSS_REGISTRY)
    assert set(REJECTIONS) == SUPPORTED_ROLLOUT_RS_OPTIONS


@pytest.mark.parametrize("given", [(), ("lachesis.seed=9", "lachesis.policy=main")])
def test_one_more_trainer_is_told_what_the_run_kept(
    blocking: BlockingBroker, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    overrides = [
        f"actor_rollout_ref.model.path={tiny_model.name}",
        "lachesis.seed=7",
        "lachesis.tracking=[file,console]",
    ]
    overrides += ["lachesis.weights_dir='w,1'", "lachesis.replica=first"]
    first = TrainerSettings(state_dir=tmp_path / "state", run=blocking.broker.keys.run, overrides=overrides)
    kept = kept_configuration(first, compose_config(overrides[:4], device="cpu"))
    blocking.call(blocking.broker.registry.keep_configuration, "main", kept)
    assert OmegaConf.create(kept.resolved).lachesis.seed == 7

    monkeypatch.chdir(tmp_path)
    asked = TrainerSettings(
        redis_url=blocking.broker.url, run=blocking.broker.keys.run, overrides=list(given), like_run=True
    )
    second = like_run(asked)
    config = compose_config(second.overrides, device="cpu")
    assert config.actor_rollout_ref.model.path == str(tiny_model)
    assert config.lachesis.weights_dir == str(tiny_model.parent / "w,1")
    assert (config.lachesis.seed, config.lachesis.replica) == (9 if given else 7, None)
    assert list(config.lachesis.tracking) == ["file", "console"]
    assert (second.state_dir, second.like_run) == (tmp_path / "state", False)
    elsewhere = asked.model_copy(update={"overrides": ["lachesis.policy=b"]})
    with pytest.raises(ConfigurationError, match="no configuration of policy 'b'; it has main"):
        like_run(elsewhere)


@pytest.mark.verl
def test_a_dry_run_writes_the_resolved_configuration_and_says_where(
    shared_redis: EmbeddedRedis, tiny_model: Path, tmp_path: Path
) -> None:
    overrides = [f"actor_rollout_ref.model.path={tiny_model}", "lachesis.num_steps=7", "lachesis.policy=p"]
    process = start_trainer(shared_redis.url, "dry", tmp_path, overrides, dry_run=True)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    written = tmp_path / "runs/dry/trainer-p.yaml"
    assert OmegaConf.load(written).actor_rollout_ref.actor.optim.total_training_steps == 7
    assert str(written) in (tmp_path / "trainer.log").read_text()


def test_help_explains_every_setting_of_ours() -> None:
    explained = explain_overrides()
    for name in compose_config([], device="cpu").lachesis:
        assert f"    {name}: " in explained, name
    assert re.search(r"device=NAME +a preset, one of\n +cpu, cuda", explained)

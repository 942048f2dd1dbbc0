"""The presets: verl's values under short names, and one line for what can't work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lachesis.broker import ConfigurationError
from lachesis.trainer.config.compose import compose_config
from lachesis.trainer.config.plan import make_plan
from lachesis.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

pytestmark = pytest.mark.verl

FOLDER = Path(__file__).parents[3] / "trainer/config"
CORRECTIONS = sorted(path.stem for path in (FOLDER / "correction").glob("*.yaml"))
Configured = Callable[..., "DictConfig"]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_correction_preset_is_verls_of_the_name_it_gives(configured: Configured, correction: str) -> None:
    from verl.trainer.config.algorithm import RolloutCorrectionConfig

    second_line = (FOLDER / f"correction/{correction}.yaml").read_text().splitlines()[1]
    method = second_line.partition("RolloutCorrectionConfig.")[2].partition("(")[0]
    expected = getattr(RolloutCorrectionConfig, method)()
    found = configured(f"correction={correction}").algorithm.rollout_correction
    assert {name: found[name] for name in found} == {name: getattr(expected, name) for name in found}


def test_each_of_verls_corrections_has_a_preset() -> None:
    from verl.trainer.config.algorithm import RolloutCorrectionConfig

    methods = {name for name, value in vars(RolloutCorrectionConfig).items() if isinstance(value, classmethod)}
    text = "".join(path.read_text() for path in (FOLDER / "correction").glob("*.yaml"))
    assert {name for name in methods if f"RolloutCorrectionConfig.{name}()" in text} == methods


def test_presets_yield_to_single_values(configured: Configured) -> None:
    config = configured(
        "algo=dapo",
        "correction=icepop",
        "actor_rollout_ref.actor.clip_ratio_high=0.3",
        "algorithm.rollout_correction.rollout_is_threshold=4",
    )
    assert (config.actor_rollout_ref.actor.clip_ratio_high, config.algorithm.filter_groups.enable) == (0.3, True)
    correction = config.algorithm.rollout_correction
    assert (correction.rollout_is, correction.rollout_is_threshold) == ("token", 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=ppo"], "algo/ppo"),
        (["correction=tis"], "correction/tis"),
        (
            ["algo=gspo", "correction=bypass_pg_is"],
            "rollout_is = 'sequence': has no effect with bypass_mode and the loss 'gspo'",
        ),
        (["distillation.enabled=true", "distillation.distillation_loss.loss_mode=k3"], "only 'forward_kl_topk' works"),
        (["algo=dapo", "algorithm.filter_groups.metric=acc"], "environments send scores only; use reward"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=ppo"], "loss_mode = 'ppo': verl has vanilla"),
        (["algorithm.adv_estimator=grop"], "adv_estimator = 'grop': verl has grpo"),
        (["algorithm.rollout_correction.rollout_rs=seq_mean_k1"], "rollout_rs_threshold must be explicitly provided"),
        (["algorithm.rollout_correction.rollout_is=word"], "rollout_is = 'word': verl has null, token, sequence"),
        (["actor_rollout_ref.actor.kl_loss_type=k4"], "kl_loss_type = 'k4': verl has kl, k1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    from lachesis.trainer.engine.verl_engine import build_engine

    def start() -> None:
        config = compose_config([f"actor_rollout_ref.model.path={tiny_model}", *overrides], device="cpu")
        make_plan(config, TrainerSettings(state_dir=tmp_path))
        build_engine(config)

    with pytest.raises(ConfigurationError) as refusal:
        start()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)

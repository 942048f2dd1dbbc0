"""Every algorithm and correction by name: a step equals the one that verl's own driver makes of the same groups.

Equal means: loss, gradient norm, every gradient and every metric that verl's driver reports, each to 1e-6 of the larger
of 1 and its own size (a gradient: of its tensor's largest element), in float32.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from trainer_kit import scored_group, stored

from lachesis.broker.packing import to_scored
from lachesis.broker.records import Group
from lachesis.trainer.configure import make_plan
from lachesis.trainer.mapping import to_batch
from lachesis.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.engine import Engine

pytestmark = pytest.mark.verl

CLOSE = 1e-6
PRESETS = Path(__file__).parents[2] / "trainer/config"
ALGORITHMS = sorted(path.stem for path in (PRESETS / "algo").glob("*.yaml"))
CORRECTIONS = sorted(path.stem for path in (PRESETS / "correction").glob("*.yaml"))
MODES: dict[str, dict[str, Any]] = {
    "padded": {"actor_rollout_ref.model.use_remove_padding": False},
    "packed": {"actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 64},  # several micro-batches
}
RATIOS = ("token_tis", "bypass_ppo_clip")  # are 1, and are not
KL_KINDS = ("kl", "abs", "mse", "low_var_kl", "k3+")
Configured = Callable[..., "DictConfig"]
Planned = Callable[..., "tuple[Engine, DictConfig]"]


def half(*values: Collection[Any]) -> list[Any]:
    """Every combination, for parametrize; every second one is long.

    Of three, the last two of two values each, what is left holds every pair; of two, every value, and each mode with
    half of the others.
    """
    combinations = itertools.product(*(enumerate(one) for one in values))
    return [
        pytest.param(
            *(value for _, value in chosen), marks=pytest.mark.long if sum(index for index, _ in chosen) % 2 else ()
        )
        for chosen in combinations
    ]


@pytest.fixture
def planned(configured: Configured, tmp_path: Path) -> Planned:
    """A fresh engine from the tiny model's weights, its configuration settled as main.py does it."""
    from lachesis.trainer.engine import build_engine

    def build(*presets: str, **values: Any) -> tuple[Engine, DictConfig]:
        config = configured(*presets)
        for name, value in values.items():
            OmegaConf.update(config, name, value)
        make_plan(config, TrainerSettings(state_dir=tmp_path))
        return build_engine(config), config

    return build


def batch(groups: list[Group], **more: bool) -> Any:
    return to_batch(groups, vocab_size=320, max_tokens=64, **more)


def trained_a_little(engine: Engine) -> None:
    """Move the weights, each in the same way every time, so that they are no longer those of the reference."""
    generator = torch.Generator().manual_seed(0)
    for parameter in engine.worker.engine.module.parameters():
        if parameter.requires_grad:
            local = parameter.data.to_local()
            local += 0.01 * torch.randn(local.shape, generator=generator)


@pytest.fixture(scope="module")
def groups(built: Callable[..., Any]) -> list[Group]:
    """Six groups that an older policy sampled: some sequences exactly as this one, some a little off, some far."""
    from lachesis.trainer.algo import Learner

    engine, config = built()
    trained_a_little(engine)
    rng = random.Random(7)
    found = [stored(scored_group(rng, turns=2)) for _ in range(6)]
    these = batch(found)
    log_probs = Learner(engine, config.algorithm).log_probs(these)[0]
    scored, row = [to_scored(group) for group in found], 0
    for group in scored:
        assert group.inference_logprobs
        for index, mask in enumerate(group.masks):
            spread = rng.choice([0.0, 1e-4, 0.1, 0.5])
            places = [place for place, value in enumerate(mask) if value != -100]
            for place in places:
                value = log_probs[row, place - places[0]].item() + rng.gauss(0, spread)
                group.inference_logprobs[index][place] = min(value, 0.0)
            row += 1
    return [stored(group) for group in scored]


def recorded_step(engine: Engine, step: Callable[[], dict[str, float]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a step reports, and the gradients that the optimizer was about to apply."""
    inner, gradients = engine.worker.engine, {}
    optimizer_step = inner.optimizer_step

    def recording() -> float:
        for name, parameter in inner.module.named_parameters():
            if parameter.requires_grad:
                gradients[name] = parameter.grad.full_tensor().clone()
        found: float = optimizer_step()
        return found

    inner.optimizer_step = recording
    try:
        return step(), gradients
    finally:
        inner.optimizer_step = optimizer_step


def assert_same_step(
    planned: Planned, groups: list[Group], *presets: str, kept: list[Group] | None = None, **values: Any
) -> dict[str, float]:
    """Train `groups` by the Learner, and `kept` (or the same) by verl's driver. Returns the Learner's metrics."""
    from verl_driver import Driver

    from lachesis.trainer.algo import Learner

    engine, config = planned(*presets, **values)
    trained_a_little(engine)
    learner = Learner(engine, config.algorithm)
    mine, my_gradients = recorded_step(engine, lambda: learner.step(batch(groups, distills=learner.distills)))
    engine, config = planned(*presets, **values)
    trained_a_little(engine)
    driver = Driver(engine.worker, config)
    theirs, their_gradients = recorded_step(engine, lambda: driver.step(kept or groups))

    assert mine["loss"] == pytest.approx(theirs.pop("actor/loss"), abs=CLOSE)
    assert mine["grad_norm"] == pytest.approx(theirs.pop("actor/grad_norm"), rel=CLOSE, abs=CLOSE)
    theirs.pop("actor/lr")  # verl's is the next step's
    compared = {
        name.removeprefix("actor/") if name.startswith("actor/rollout_corr/") else name: value
        for name, value in theirs.items()
        if not name.startswith(("actor/perf/", "actor/mfu"))
    }
    for name, value in compared.items():
        assert mine[name] == pytest.approx(value, rel=CLOSE, abs=CLOSE), name
    assert len(compared) >= 4
    assert my_gradients.keys() == their_gradients.keys()
    assert len(my_gradients) > 20
    for name, expected in their_gradients.items():
        assert (my_gradients[name] - expected).abs().max() <= CLOSE * max(1, expected.abs().max()), name
    assert max(gradient.abs().max() for gradient in my_gradients.values()) > 1e-3
    return mine


@pytest.mark.parametrize(("algo", "correction", "mode"), half(ALGORITHMS, RATIOS, MODES))
def test_an_algorithms_step_is_verls(
    planned: Planned, groups: list[Group], algo: str, correction: str, mode: str
) -> None:
    mine = assert_same_step(planned, groups, f"algo={algo}", f"correction={correction}", **MODES[mode])
    assert (mine["clip_frac"] > 0) == (correction == "bypass_ppo_clip")


@pytest.mark.parametrize(("correction", "mode"), half(CORRECTIONS, MODES))
def test_a_corrections_step_is_verls(planned: Planned, groups: list[Group], correction: str, mode: str) -> None:
    mine = assert_same_step(planned, groups, f"correction={correction}", **MODES[mode])
    if "_rs" in correction:
        assert 0 < mine["rollout_corr/rollout_rs_seq_masked_fraction"] < 1


@pytest.mark.parametrize("mode", MODES)
def test_the_entropy_bonus_is_verls(planned: Planned, groups: list[Group], mode: str) -> None:
    values = MODES[mode] | {"actor_rollout_ref.actor.entropy_coeff": 0.01}
    mine = assert_same_step(planned, groups, **values)
    assert mine["actor/entropy_loss"] == pytest.approx(mine["entropy"], rel=1e-5)


@pytest.mark.parametrize(("kind", "mode"), half(KL_KINDS, MODES))
def test_kl_loss_against_the_reference_is_verls(planned: Planned, groups: list[Group], kind: str, mode: str) -> None:
    actor = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": kind}
    values = MODES[mode] | {f"actor_rollout_ref.actor.{name}": value for name, value in actor.items()}
    mine = assert_same_step(planned, groups, **values)
    assert abs(mine["actor/kl_loss"]) > 1e-3


@pytest.mark.parametrize(("algo", "mode"), half(["grpo", "reinforce_plus_plus", "rloo"], MODES))
def test_kl_in_the_reward_is_verls(planned: Planned, groups: list[Group], algo: str, mode: str) -> None:
    values = MODES[mode] | {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0.1}
    mine = assert_same_step(planned, groups, f"algo={algo}", **values)
    assert abs(mine["actor/reward_kl_penalty"]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_an_adapter_is_verls(planned: Planned, groups: list[Group], mode: str) -> None:
    """With the KL to the model without it, as in verl."""
    adapter = {"actor_rollout_ref.model.lora_rank": 4, "actor_rollout_ref.actor.use_kl_loss": True}
    assert_same_step(planned, groups, **MODES[mode], **adapter)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rewards", [True, False])
def test_distillation_is_verls(planned: Planned, groups: list[Group], rewards: bool, mode: str) -> None:
    rng = random.Random(11)
    taught = []
    for group in groups:
        scored = to_scored(group)
        # as an inference server says it: for every token but the first, prompt included
        scored.distill_token_ids = [
            [rng.sample(range(250), 5) if place else [] for place in range(len(row))] for row in scored.tokens
        ]
        scored.distill_logprobs = [
            [[-rng.uniform(0.5, 4) for _ in ids] for ids in row] for row in scored.distill_token_ids
        ]
        taught.append(stored(scored))
    loss = {"use_task_rewards": rewards, "distillation_loss_coef": 0.5}
    values = {f"distillation.distillation_loss.{name}": value for name, value in loss.items()}
    mine = assert_same_step(planned, taught, **MODES[mode], **values, **{"distillation.enabled": True})
    assert mine["actor/distillation/loss"] > 1e-2
    assert ("actor/pg_loss" in mine) == rewards


@pytest.mark.parametrize("size", [1, 6, 24])
def test_gradients_accumulate_over_micro_batches(planned: Planned, groups: list[Group], size: int) -> None:
    values = {
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.actor.use_dynamic_bsz": False,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": size,
    }
    assert_same_step(planned, groups, **values)


def test_micro_batches_of_a_fixed_size_get_smaller_where_rows_are_missing(
    planned: Planned, groups: list[Group]
) -> None:
    from lachesis.trainer.algo import Learner

    values = {
        "actor_rollout_ref.actor.use_dynamic_bsz": False,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
    }
    scored = to_scored(groups[0])
    scored.masks[0] = [-100] * len(scored.masks[0])
    fewer = [stored(scored), *groups[1:]]
    assert len(batch(fewer).rows) == 23
    engine, config = planned(**values)
    mine, fixed = recorded_step(engine, lambda: Learner(engine, config.algorithm).step(batch(fewer)))
    other, config = planned()
    expected, dynamic = recorded_step(other, lambda: Learner(other, config.algorithm).step(batch(fewer)))
    assert mine["loss"] == pytest.approx(expected["loss"], abs=CLOSE)
    assert all((fixed[name] - dynamic[name]).abs().max() <= 1e-5 for name in dynamic)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"lr_scheduler_type": "constant", "lr_warmup_steps": 2}, [0, 0.5, 1, 1]),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}, [1, 0.86819, 0.55, 0.23181]),
        ({"lr_scheduler_type": "cosine", "lr_warmup_steps_ratio": 0.5}, [0, 0.5, 1, 0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    planned: Planned, groups: list[Group], schedule: dict[str, Any], rates: list[float]
) -> None:
    from verl_driver import Driver

    from lachesis.trainer.algo import Learner

    values = {f"actor_rollout_ref.actor.optim.{name}": value for name, value in schedule.items()}
    engine, config = planned(**values, **{"lachesis.num_steps": 4})
    learner = Learner(engine, config.algorithm)
    nothing = to_batch(groups[:1], vocab_size=320, max_tokens=1)  # an untrained step counts, too
    mine = [learner.step(nothing if step == 1 else batch(groups[:2]))["lr"] for step in range(4)]
    assert mine == pytest.approx([rate * 1e-2 for rate in rates], rel=1e-4)
    engine, config = planned(**values, **{"lachesis.num_steps": 4})
    driver = Driver(engine.worker, config)
    theirs = [driver.step(groups[:2])["actor/lr"] for _ in range(3)]  # the rates of the steps to come
    assert mine[1:] == pytest.approx(theirs, rel=CLOSE)


# -- what is left out ---------------------------------------------------------------------------------------------


def flat(group: Group) -> Group:
    scored = to_scored(group)
    scored.scores = [2.0] * len(scored.scores)
    return stored(scored)


@pytest.mark.parametrize("mode", MODES)
def test_dapo_leaves_out_groups_whose_scores_are_equal(planned: Planned, groups: list[Group], mode: str) -> None:
    some_flat = [groups[0], flat(groups[1]), groups[2], flat(groups[3]), *groups[4:]]
    kept = [groups[0], groups[2], *groups[4:]]
    mine = assert_same_step(planned, some_flat, "algo=dapo", kept=kept, **MODES[mode])
    assert (mine["filtered_groups"], mine["filtered_sequences"]) == (2, 8)


def test_the_filter_spares_groups_of_one_and_advantages_that_were_sent(
    configured: Configured, groups: list[Group]
) -> None:
    from lachesis.trainer.advantages import without_flat_groups

    given, alone = to_scored(flat(groups[0])), to_scored(groups[1])
    given.advantages = [[1.0] * len(row) for row in given.tokens]
    for name in ("tokens", "masks", "scores", "inference_logprobs"):
        setattr(alone, name, getattr(alone, name)[:1])
    these = batch([stored(given), stored(alone), flat(groups[2])])
    kept, counts = without_flat_groups(these, configured("algo=dapo").algorithm)
    assert kept.group_sizes.tolist() == [4] * 4 + [1]
    assert counts == {"filtered_groups": 1, "filtered_sequences": 4}


@pytest.mark.parametrize("overrides", [("algo=dapo",), ("correction=geometric_rs",)], ids=["filtered", "rejected"])
def test_a_step_of_which_nothing_is_left_changes_nothing(
    planned: Planned, groups: list[Group], overrides: tuple[str, ...]
) -> None:
    from lachesis.trainer.algo import Learner

    scored = [to_scored(flat(group)) for group in groups]
    for group in scored:  # far from any policy
        group.inference_logprobs = [[x - (x <= 0) for x in row] for row in group.inference_logprobs or []]
    these = [stored(group) for group in scored]
    engine, config = planned(*overrides)
    before = {name: tensor.clone() for name, tensor in engine.worker.engine.get_per_tensor_param()[0]}
    metrics = Learner(engine, config.algorithm).step(batch(these))
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    after = dict(engine.worker.engine.get_per_tensor_param()[0])
    assert all(torch.equal(before[name], after[name]) for name in before)

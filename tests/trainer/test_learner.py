"""The step itself, on a real verl engine: against Hugging Face's own log-probs and against verl's own driver."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from trainer_kit import scored_group, stored

from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.trainer.data.collate import to_batch

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.engine.verl_engine import Engine

pytestmark = pytest.mark.verl

SMALL_PACKS = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=64"  # several packed micro-batches
Built = Callable[..., "tuple[Engine, DictConfig]"]


def some_groups(count: int = 4, *, turns: int = 2, seed: int = 1) -> list[Group]:
    rng = random.Random(seed)
    return [stored(scored_group(rng, turns=turns)) for _ in range(count)]


def learner(built: Built, *overrides: str) -> tuple[Learner, Engine]:
    from lachesis.trainer.algo.learner import Learner

    engine, config = built(*overrides)
    return Learner(engine, config.algorithm), engine


def batch(groups: list[Group]) -> Any:
    return to_batch(groups, vocab_size=320, max_tokens=128)


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.worker.engine.get_per_tensor_param()[0]}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.fixture(scope="module")
def reader(built: Built) -> Learner:
    """A learner whose weights no test changes."""
    return learner(built)[0]


@pytest.mark.parametrize("turns", [1, 3], ids=["one turn", "three turns"])
@pytest.mark.parametrize("overrides", [(), (SMALL_PACKS,)], ids=["padded", "packed"])
def test_log_probs_are_those_of_hugging_face(
    built: Built, tiny_model: Path, overrides: tuple[str, ...], turns: int
) -> None:
    from transformers import AutoModelForCausalLM

    these = batch(some_groups(turns=turns))
    log_probs, entropy = learner(built, *overrides)[0].log_probs(these)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager", dtype=torch.float32)
    for place, row in enumerate(these.rows.tolist()):
        ids = these.model["input_ids"].unbind()[place]
        start = len(these.model["prompts"].unbind()[place])
        with torch.no_grad():
            all_log_probs = reference(ids[None]).logits[0].log_softmax(-1)
        expected = all_log_probs[start - 1 : -1].gather(-1, ids[start:, None]).squeeze(-1)
        spread = -(all_log_probs.exp() * all_log_probs).sum(-1)[start - 1 : -1]
        assert (log_probs[row, : len(expected)] - expected).abs().max() <= 1e-5
        assert (entropy[row, : len(expected)] - spread).abs().max() <= 1e-4


def test_the_temperature_of_each_sequence_is_applied(reader: Learner) -> None:
    group = scored_group(random.Random(3), sequences=2)
    group.tokens[1], group.masks[1] = group.tokens[0], group.masks[0]
    group.inference_logprobs = None
    group.overrides = [{}, {"temperature": 0.5}]
    same, sharper = reader.log_probs(batch([stored(group)]))[1]
    assert (sharper < same)[batch([stored(group)]).response_mask[0].bool()].all()


def test_the_loss_learns_what_is_rewarded(built: Built) -> None:
    mine, _ = learner(built)
    group = scored_group(random.Random(5), sequences=4)
    group.scores, group.inference_logprobs = [1.0, 0.0, 0.0, 0.0], None
    these = batch([stored(group)])
    trained = these.response_mask.bool()
    before = mine.log_probs(these)[0]
    for _ in range(3):
        mine.step(these)
    change = torch.where(trained, mine.log_probs(these)[0] - before, 0).sum(1)
    assert change[0] > 1
    assert (change[0] > change[1:]).all()


# -- advantages ---------------------------------------------------------------------------------------------------


@pytest.fixture
def algorithm(configured: Callable[..., DictConfig]) -> DictConfig:
    return configured().algorithm


def advantages(algorithm: DictConfig, *groups: ScoredGroup) -> Tensor:
    """One per sequence: all its trained tokens have the same."""
    from lachesis.trainer.algo.advantages import estimate_advantages

    these = batch([stored(group) for group in groups])
    found, trained = estimate_advantages(these, these.response_mask, algorithm), these.response_mask
    assert torch.equal(found * trained, found)
    return found.sum(1) / trained.sum(1).clamp(min=1)


def group_with(scores: list[float], **fields: Any) -> ScoredGroup:
    rows = [[9, 8, 7, token] for token in range(10, 10 + len(scores))]
    more = {"masks": [[-100, -100, *row[2:]] for row in rows], **fields}
    return ScoredGroup(tokens=rows, scores=scores, **more)


def test_grpo_normalises_within_the_group(algorithm: DictConfig) -> None:
    found = advantages(algorithm, group_with([1, 1, 0, 0]), group_with([5, 5, 5, 5]))
    assert found.tolist() == pytest.approx([0.866, 0.866, -0.866, -0.866, 0, 0, 0, 0], abs=1e-3)


def test_an_advantage_is_zeroed_after_normalisation(algorithm: DictConfig) -> None:
    plain = advantages(algorithm, group_with([1, 1, 0, 0]))
    zeroed = advantages(algorithm, group_with([1, 1, 0, 0], overrides=[{"set_advantage_to_zero": True}, {}, {}, {}]))
    assert zeroed[0] == 0
    assert torch.equal(zeroed[1:], plain[1:])


def test_a_sequence_outside_the_model_still_counts_in_the_baseline(algorithm: DictConfig) -> None:
    masks = [[-100] * 4, *([[-100, -100, 7, 7]] * 3)]
    found = advantages(algorithm, group_with([1, 1, 0, 0], masks=masks))
    assert found.tolist() == pytest.approx([0, 0.866, -0.866, -0.866], abs=1e-3)


def test_advantages_that_were_sent_are_used_as_they_are(algorithm: DictConfig) -> None:
    from lachesis.trainer.algo.advantages import estimate_advantages

    sent = [[9.0, 9.0, 0.25, -2.0]] * 2
    these = batch([stored(group_with([1, 0], advantages=sent)), stored(group_with([1, 0]))])
    found = estimate_advantages(these, these.response_mask, algorithm)
    assert found[0, :2].tolist() == found[1, :2].tolist() == [0.25, -2.0]
    assert found[2, :2].tolist() == pytest.approx([0.7071] * 2, abs=1e-3)


def test_a_group_of_one_teaches_nothing(algorithm: DictConfig) -> None:
    assert advantages(algorithm, group_with([3.0]), group_with([1, 0])).tolist()[0] == 0


@pytest.mark.parametrize(
    "name", ["rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "grpo_vectorized", "gpg"]
)
def test_verls_other_estimators_work_by_name(algorithm: DictConfig, name: str) -> None:
    algorithm.adv_estimator = name
    found = advantages(algorithm, group_with([2, 1, 0, 0]), group_with([0, 0, 1, 1]))
    assert found[0] > found[1] > found[2]
    assert torch.isfinite(found).all()


# -- off-policy correction ----------------------------------------------------------------------------------------


def test_importance_weights_are_truncated_and_unknown_log_probs_count_as_on_policy(algorithm: DictConfig) -> None:
    from lachesis.trainer.algo.rollout_correction import correct

    group = group_with([1, 0], inference_logprobs=[[1.0, 1.0, -9.0, 1.0], [1.0, 1.0, -2.0, -2.5]])
    these = batch([stored(group)])
    old = torch.tensor([[-3.0, -3.0], [-3.0, -3.0]])
    mask, found, metrics = correct(these, old, algorithm.rollout_correction)
    assert found is not None
    assert found.flatten().tolist() == pytest.approx([2.0, 1.0, math.exp(-1), math.exp(-0.5)])
    assert torch.equal(mask, these.response_mask)
    assert metrics["rollout_corr/rollout_is_max"] == 2.0


def test_rejected_tokens_are_not_trained(algorithm: DictConfig) -> None:
    from lachesis.trainer.algo.rollout_correction import correct

    algorithm.rollout_correction.rollout_rs = "token_k1"
    algorithm.rollout_correction.rollout_rs_threshold = "0.5_2.0"
    group = group_with([1, 0], inference_logprobs=[[1.0, 1.0, -9.0, 1.0], [1.0, 1.0, -2.9, -1.0]])
    mask, _, _ = correct(batch([stored(group)]), torch.full((2, 2), -3.0), algorithm.rollout_correction)
    assert mask.tolist() == [[0, 1], [1, 0]]


def test_bypass_mode_takes_the_samplers_log_probs_for_the_old_ones(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.config.plan import make_plan
    from lachesis.trainer.engine.verl_engine import build_engine
    from lachesis.trainer.settings import TrainerSettings

    config = configured("algorithm.rollout_correction.bypass_mode=true")
    make_plan(config, TrainerSettings(state_dir=tmp_path))
    metrics = Learner(build_engine(config), config.algorithm).step(batch(some_groups(2)))
    assert "entropy" not in metrics  # no second forward pass
    assert metrics["kl"] != 0  # of the sampler's policy to this one, no longer 0 by construction
    assert metrics["grad_norm"] > 0


def test_a_batch_without_targets_changes_nothing(built: Built) -> None:
    mine, engine = learner(built)
    before = weights(engine)
    metrics = mine.step(batch([stored(group_with([1, 0], masks=[[-100] * 4] * 2))]))
    assert metrics["loss"] == 0
    assert distance(weights(engine), before) == 0

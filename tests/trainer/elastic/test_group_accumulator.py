"""Steps of a few groups' gradients each, summed, against verl's step of the whole batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rank_process import uneven_groups
from torch import Tensor
from trainer_kit import scored_group, stored

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.groups import Group
from lachesis.broker.records.steps import BatchEntry
from lachesis.trainer.data.collate import to_batch

if TYPE_CHECKING:
    from lachesis.trainer.elastic.group_accumulator import GroupAccumulator

pytestmark = pytest.mark.verl

ACTOR = "actor_rollout_ref.actor"
# weights that move as the gradients do; Adam makes whole steps of the rounding of one that is about zero
PLAIN = (f"{ACTOR}.optim.optimizer=SGD", f"{ACTOR}.optim.lr=0.1")
CASES = {
    "token_mean": (),
    "seq_mean_token_mean": (f"{ACTOR}.loss_agg_mode=seq-mean-token-mean",),
    "token_sum": (f"{ACTOR}.loss_agg_mode=token-sum",),
    "dr_grpo": ("algo=dr_grpo", f"{ACTOR}.loss_scale_factor=128"),
    "gspo": ("algo=gspo", "correction=sequence_tis"),
    "dapo": ("algo=dapo", f"{ACTOR}.entropy_coeff=0.01"),
    "cispo": ("algo=cispo", f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=2"),
    "opo": ("algo=opo", "correction=bypass_ppo_clip_geo_rs"),
    "rejecting": ("correction=decoupled_seq_is_rs",),
    "reference": (f"{ACTOR}.use_kl_loss=true", "algorithm.use_kl_in_reward=true"),
    "lora": ("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=8"),
}
Mapping = partial(to_batch, vocab_size=320, max_tokens=128)


def entry(step: int, groups: Sequence[Group]) -> BatchEntry:
    return BatchEntry(step, tuple(group.gid for group in groups), 0, 0, 0, 0, 0.0)


def weights(engine: Any) -> dict[str, Tensor]:
    from lachesis.trainer.engine.export import published_tensors

    return {name: tensor.detach().clone() for name, tensor in published_tensors(engine)}


def replica(built: Callable[..., Any], *overrides: str, exact: bool) -> tuple[GroupAccumulator, Any]:
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.config.algorithms import SUMMED
    from lachesis.trainer.elastic.group_accumulator import GroupAccumulator

    _, config = built(*overrides)
    mode, divide_by = SUMMED[config.actor_rollout_ref.actor.loss_agg_mode]
    engine, config = built(*overrides, f"{ACTOR}.loss_agg_mode={mode}")
    learner = Learner(engine, config.algorithm)
    return GroupAccumulator(engine, learner, Mapping, divide_by=divide_by, exact=exact), engine


def together(replicas: Sequence[GroupAccumulator], step: int, groups: Sequence[Group], at_once: int = 1) -> None:
    """One step: the groups are dealt out in turns, so many at once, sums are added, all apply them."""
    batch, told = entry(step, groups), [b""] * len(groups)
    for number, replica in enumerate(replicas):
        mine = list(range(number, len(groups), len(replicas)))[::-1]
        for places in (mine[start : start + at_once] for start in range(0, len(mine), at_once)):
            words = replica.accumulate(batch, [(place, groups[place]) for place in places])
            for place, word in zip(places, words, strict=True):
                told[place] = word
    sums = [
        torch.stack(parts).sum(0) for parts in zip(*(one.sums(torch.device("cpu")) for one in replicas), strict=True)
    ]
    for one in replicas:
        one.apply(batch, sums, told)


@pytest.mark.parametrize("exact", [False, True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_groups_make_the_step_of_the_batch(built: Callable[..., Any], overrides: tuple[str, ...], exact: bool) -> None:
    from lachesis.trainer.algo.learner import Learner

    overrides = (*PLAIN, *overrides)
    single, config = built(*overrides)
    learner = Learner(single, config.algorithm)
    replicas = [replica(built, *overrides, exact=exact) for _ in range(2)]
    for step in (1, 2):
        groups = [*uneven_groups(step), stored(scored_group(random.Random(step)))]
        expected = learner.step(Mapping(groups))
        together([one for one, _ in replicas], step, groups, at_once=2)
        found = replicas[0][0].metrics
        assert expected.keys() == found.keys()
        for name in ("loss", "grad_norm", "lr", "entropy", "logp_gap_mean", "logp_gap_max", "actor/pg_loss"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-6), (step, name)
    expected_weights, (first, second) = weights(single), [weights(engine) for _, engine in replicas]
    for name, tensor in expected_weights.items():
        assert first[name].equal(second[name])
        assert (first[name] - tensor).abs().max() < 1e-5, name


def test_exact_sums_do_not_show_who_trained_what(built: Callable[..., Any]) -> None:
    groups = [stored(scored_group(random.Random(number))) for number in range(5)]
    found = []
    for count in (1, 2, 3):
        replicas = [replica(built, exact=True) for _ in range(count)]
        for step in (1, 2, 3):
            together([one for one, _ in replicas], step, groups)
        found.append(weights(replicas[-1][1]))
    assert all(found[0][name].equal(other[name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("overrides", [(), ("actor_rollout_ref.model.lora_rank=4",)], ids=["full", "lora"])
@pytest.mark.parametrize("steps", [0, 2])
def test_state_given_to_another_goes_on_as_the_giver(
    built: Callable[..., Any], steps: int, overrides: tuple[str, ...]
) -> None:
    schedule = (f"{ACTOR}.optim.lr_warmup_steps=5", f"{ACTOR}.optim.weight_decay=0.1", *overrides)
    groups = [stored(scored_group(random.Random(number))) for number in range(3)]
    (giver, giving), (taker, taking) = (replica(built, *schedule, exact=False) for _ in range(2))
    for step in range(1, steps + 1):
        together([giver], step, groups)
    together([taker], 1, [stored(scored_group(random.Random(9)))])  # it has lived before
    header, tensors = giver.state()
    received = taker.blank(header)
    assert [(one.shape, one.dtype) for one in received] == [(one.shape, one.dtype) for one in tensors]
    for one, other in zip(received, tensors, strict=True):
        one.copy_(other)
    taker.load(header, received)
    for step in range(steps + 1, steps + 3):
        for learner in (giver, taker):
            together([learner], step, groups)
        assert taker.metrics["lr"] == giver.metrics["lr"]
    mine, theirs = weights(giving), weights(taking)
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_a_step_with_nothing_to_train_goes_on_in_the_schedule(built: Callable[..., Any]) -> None:
    one, engine = replica(built, exact=False)
    before = weights(engine)
    group = stored(scored_group(random.Random(0)))
    group.masks = [np.full(len(row), -100) for row in group.masks]
    together([one], 1, [group])
    assert (one.metrics["loss"], one.metrics["grad_norm"]) == (0.0, 0.0)
    assert all(before[name].equal(tensor) for name, tensor in weights(engine).items())


REFUSED = {
    "reinforce_plus_plus": ("algo=reinforce_plus_plus",),
    "estimator": ("algorithm.adv_estimator=reinforce_plus_plus_baseline",),
    "loss": (f"{ACTOR}.policy_loss.loss_mode=kl_cov",),
    "batch_normalize": ("algorithm.rollout_correction.rollout_is_batch_normalize=true",),
    "distillation": ("distillation.enabled=true",),
}


@pytest.mark.parametrize("overrides", REFUSED.values(), ids=REFUSED)
def test_what_needs_the_whole_batch_is_refused(configured: Callable[..., Any], overrides: tuple[str, ...]) -> None:
    from lachesis.trainer.config.algorithms import check_elastic

    with pytest.raises(ConfigurationError, match=r"not with lachesis\.elastic"):
        check_elastic(configured(*overrides))

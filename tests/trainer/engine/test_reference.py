"""Where the reference's log-probs come from. That KL terms made of them are verl's is for algorithms/test_loss_terms.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trainer_kit import scored_group, stored

from lachesis.broker import ConfigurationError
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.trainer.config.plan import make_plan
from lachesis.trainer.data.collate import to_batch
from lachesis.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.engine.verl_engine import Engine

pytestmark = pytest.mark.verl
KL_LOSS = ("actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_type=mse")
Built = Callable[..., "tuple[Engine, DictConfig]"]


def batch(*groups: Group) -> Any:
    return to_batch(groups, vocab_size=320, max_tokens=64)


def with_reference(group: ScoredGroup, value: float = -2.0) -> Group:
    group.ref_logprobs = [[1.0 if mark == -100 else value for mark in mask] for mask in group.masks]
    return stored(group)


def is_built(engine: Engine) -> bool:
    return engine.reference is not None and engine.reference._worker is not None


def test_log_probs_that_were_sent_are_used_and_no_model_is_built(built: Built) -> None:
    from lachesis.trainer.algo.learner import Learner

    engine, config = built(*KL_LOSS)
    learner = Learner(engine, config.algorithm)
    these = batch(with_reference(scored_group(random.Random(1), turns=2)))
    expected = 0.5 * (learner.log_probs(these)[0] + 2)[these.response_mask.bool()].square().mean()
    assert learner.step(these)["actor/kl_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert not is_built(engine)


def test_what_was_not_sent_is_the_first_models(built: Built) -> None:
    from lachesis.trainer.algo.learner import Learner

    engine, config = built(*KL_LOSS)
    learner = Learner(engine, config.algorithm)
    sent, unsent, partly = (scored_group(random.Random(seed)) for seed in range(3))
    partial = with_reference(partly)
    assert partial.ref_logprobs
    partial.ref_logprobs[1] = torch.ones(len(partial.ref_logprobs[1])).numpy()  # 1.0: none here
    these = batch(with_reference(sent), stored(unsent), partial)
    first = learner.log_probs(these)[0]
    learner.step(these)
    learner.step(these)  # the reference stays what it was
    assert is_built(engine)
    found, trained = learner._reference_log_probs(these), these.response_mask.bool()
    for row in range(12):
        theirs = row < 4 or row in (8, 10, 11)
        expected = torch.full_like(first[row], -2) if theirs else first[row]
        assert torch.allclose(found[row][trained[row]], expected[trained[row]], atol=1e-6), row
    assert (first - learner.log_probs(these)[0])[trained].abs().max() > 1e-2


def test_it_does_not_matter_when_the_reference_is_built(built: Built) -> None:
    """A resumed trainer builds it at another step than the one that was stopped."""
    engine, _ = built(*KL_LOSS)
    before = torch.random.get_rng_state()
    assert engine.reference is not None
    assert engine.reference.worker.engine.optimizer is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_kl_term_there_is_no_reference(built: Built) -> None:
    assert built()[0].reference is None


def test_a_coefficient_that_adapts_is_refused(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    config = configured("algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=adaptive")
    with pytest.raises(ConfigurationError, match="'adaptive': its coefficient is not in checkpoints; use fixed"):
        make_plan(config, TrainerSettings(state_dir=tmp_path))

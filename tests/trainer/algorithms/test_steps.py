"""What a step is cut into, what it leaves out, and its learning rate, as in verl's own driver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_step import CLOSE, MODES, Configured, Planned, assert_same_step, batch, recorded_step
from trainer_kit import stored

from lachesis.broker.records.groups import Group
from lachesis.broker.records.packing import to_scored
from lachesis.trainer.data.collate import to_batch

pytestmark = pytest.mark.verl


@pytest.mark.parametrize("size", [1, 6, 24])
def test_gradients_accumulate_over_micro_batches(planned: Planned, groups: list[Group], size: int) -> None:
    values: dict[str, Any] = {
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.actor.use_dynamic_bsz": False,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": size,
    }
    assert_same_step(planned, groups, **values)


def test_micro_batches_of_a_fixed_size_get_smaller_where_rows_are_missing(
    planned: Planned, groups: list[Group]
) -> None:
    from lachesis.trainer.algo.learner import Learner

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

    from lachesis.trainer.algo.learner import Learner

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
    from lachesis.trainer.algo.advantages import without_flat_groups

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
    from lachesis.trainer.algo.learner import Learner

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

"""Checkpoints: a run that is interrupted and one that is not end with the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from trainer_kit import scored_group, stored

from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.data.collate import to_batch

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.broker import BlockingBroker
    from lachesis.trainer.engine.verl_engine import Engine

pytestmark = pytest.mark.verl


def batches(count: int) -> list[TrainingBatch]:
    rng = random.Random(0)
    return [to_batch([stored(scored_group(rng))], vocab_size=320, max_tokens=128) for _ in range(count)]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("actor_rollout_ref.model.lora_rank=4",),
        ("actor_rollout_ref.actor.use_kl_loss=true",),
        ("algorithm.use_kl_in_reward=true",),
    ],
    ids=["all weights", "adapter", "KL loss", "KL in the reward"],
)
def test_resuming_is_bit_for_bit(
    built: Callable[..., tuple[Engine, DictConfig]], tmp_path: Path, blocking: BlockingBroker, more: tuple[str, ...]
) -> None:
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.engine.export import published_tensors
    from lachesis.trainer.weights.checkpoint import Checkpoints

    schedule = [  # so that a scheduler that starts over would show
        "lachesis.num_steps=4",
        "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=1",
        *more,
    ]

    def trained(engine: Engine, config: DictConfig, these: list[TrainingBatch]) -> list[dict[str, float]]:
        learner = Learner(engine, config.algorithm)
        found = [learner.step(batch) for batch in these]
        return [{key: value for key, value in metrics.items() if not key.endswith("_s")} for metrics in found]

    whole, config = built(*schedule)
    expected = trained(whole, config, batches(4))
    first, config = built(*schedule)
    trained(first, config, batches(4)[:2])
    Checkpoints(tmp_path, first.worker, blocking, "main").save(2)
    noise = torch.rand(1)
    second, config = built(*schedule)
    checkpoints = Checkpoints(tmp_path, second.worker, blocking, "main")
    assert checkpoints.steps() == [2]
    checkpoints.load(2)
    assert torch.equal(torch.rand(1), noise)
    assert trained(second, config, batches(4)[2:]) == expected[2:]
    left, right = (dict(published_tensors(engine)) for engine in (whole, second))
    assert all(left[name].equal(right[name]) for name in left)
    assert expected[2]["lr"] > expected[3]["lr"] > 0


def test_the_newest_two_are_kept_and_halves_do_not_count(
    built: Callable[..., tuple[Engine, DictConfig]], tmp_path: Path, blocking: BlockingBroker
) -> None:
    from lachesis.trainer.weights.checkpoint import Checkpoints

    engine, _ = built()
    checkpoints = Checkpoints(tmp_path, engine.worker, blocking, "main")
    for step in (1, 2, 3):
        checkpoints.save(step)
    assert checkpoints.steps() == [2, 3]
    (tmp_path / "step-4.tmp").mkdir()
    (tmp_path / "step-5").mkdir()  # its deletion was interrupted
    again = Checkpoints(tmp_path, engine.worker, blocking, "main")
    assert again.steps() == [2, 3]
    again.save(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-5"]


class Writes:
    """A worker whose checkpoint is one file; `meanwhile` happens while it writes."""

    def __init__(self, says: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._says, self._meanwhile = says, meanwhile

    def save_checkpoint(self, folder: str, *_: object) -> None:
        self._meanwhile()
        (Path(folder) / "says").write_text(self._says)


def test_one_that_was_stopped_while_it_saved_leaves_its_successor_alone(
    tmp_path: Path, blocking: BlockingBroker
) -> None:
    """It wakes when another has saved that step; its own folder is cleared by whoever came before it began to write."""
    from lachesis.trainer.weights.checkpoint import Checkpoints

    def made(worker: Writes) -> Checkpoints:
        return Checkpoints(tmp_path, worker, blocking, "main")

    successor = made(Writes("successor"))
    made(Writes("zombie", lambda: successor.save(1))).save(1)
    assert (tmp_path / "step-1" / "says").read_text() == "successor"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]

    cleared = made(Writes("zombie", lambda: made(Writes("successor")).save(2)))
    with pytest.raises(FileNotFoundError):
        cleared.save(2)
    assert (tmp_path / "step-2" / "says").read_text() == "successor"
    assert made(Writes("")).steps() == [1, 2]

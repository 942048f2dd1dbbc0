"""Several ranks train as one does: the same loss, the same gradients, the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rank_process import train

from lachesis.trainer.engine.distributed import share

pytestmark = pytest.mark.verl

ACTOR = "actor_rollout_ref.actor"
# weights that move as the gradients do; a first step of Adam is their sign, where rounding shows if one is about zero
PLAIN = (f"{ACTOR}.optim.optimizer=SGD", f"{ACTOR}.optim.lr=0.1")
CASES = {
    "padded": (),
    "packed": (f"{ACTOR}.ppo_max_token_len_per_gpu=80",),
    "sequence_mean": (f"{ACTOR}.loss_agg_mode=seq-mean-token-mean",),
    "fixed_micro_batches": (f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=2"),
    "reinforce_plus_plus": ("algo=reinforce_plus_plus",),
    "dapo": ("algo=dapo", "correction=sequence_tis", f"{ACTOR}.entropy_coeff=0.01"),
    "reference": (
        f"{ACTOR}.use_kl_loss=true",
        "algorithm.use_kl_in_reward=true",
        f"{ACTOR}.ppo_max_token_len_per_gpu=80",
    ),
    "lora": ("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=8"),
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_ranks_make_the_step_of_one(tiny_model: Path, overrides: tuple[str, ...]) -> None:
    expected, weights = train(tiny_model, (*PLAIN, *overrides), 1)
    for ranks in (2, 3) if not overrides else (2,):
        found, theirs = train(tiny_model, (*PLAIN, *overrides), ranks)
        for step, (one, several) in enumerate(zip(expected, found, strict=True)):
            assert one.keys() == several.keys()
            for name in one.keys() - {"logp_s", "train_s"}:
                assert several[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (step, name)
        assert weights.keys() == theirs.keys()
        assert max(np.abs(weights[name] - theirs[name]).max() for name in weights) < 1e-5


def test_rows_are_shared_evenly() -> None:
    lengths = [7, 7, 7, 1, 1, 1, 90]
    parts = share(lengths, 3)
    assert sorted(row for part in parts for row in part) == list(range(7))
    assert max(map(len, parts)) == 3
    assert share([5], 2) in ([[0], []], [[], [0]])
    assert share(lengths, 1) == [list(range(7))]

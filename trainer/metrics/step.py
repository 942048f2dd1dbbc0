"""What a step's log says about its data, in short names of ours and in verl's where verl has one for the same thing.

The tensors' letters: N sequences, R tokens of the longest response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lachesis.broker.records.groups import Group
from lachesis.broker.records.steps import LedgerEntry
from lachesis.trainer.data.policy_lag import lag_metrics, spread

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Estimated
    from lachesis.trainer.data.batch import TrainingBatch

# our short names, for what verl's drivers log under these
VERLS = {
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "lr": "actor/lr",
    "entropy": "actor/entropy",
    "kl": "actor/ppo_kl",
    "clip_frac": "actor/pg_clipfrac",
    "step": "training/global_step",
    "version": "fully_async/count/current_param_version",
    "wait_share": "fully_async/trainer/idle_ratio",
    "tokens": "perf/total_num_tokens",
    "tokens_per_s": "perf/throughput",
    "step_s": "timing_s/step",
    "wait_s": "timing_s/gen",
    "logp_s": "timing_s/old_log_prob",
    "train_s": "timing_s/update_actor",
    "publish_s": "timing_s/update_weights",
    "checkpoint_s": "timing_s/save_checkpoint",
}
NOT_TOLD = ("lag", "lag_mean", "reward")  # verl's names for them are among the step's own


def batch_metrics(
    entry: LedgerEntry, groups: Sequence[Group], batch: TrainingBatch, estimated: Estimated | None
) -> dict[str, float]:
    """Step, reward (mean score of all sequences, nothing filtered), lag in versions, sizes, advantages."""
    of = {group.gid: group for group in groups}
    sequences = [(of[uid], place) for uid, place in zip(batch.uids, batch.places.tolist(), strict=True)]
    scores = batch.scores.numpy()
    found = {
        "step": entry.step,
        "reward": entry.reward,
        "lag": entry.lag,
        "sequences": entry.n,
        "tokens": batch.tokens,
        "trained_tokens": int(batch.response_mask.sum()),
        "zero_variance_groups": sum(len(group.scores) > 1 and np.ptp(group.scores) == 0 for group in groups),
        "unfit_sequences": batch.unfit,
        **spread("critic/score", scores),
        **spread("critic/rewards", batch.token_level_rewards.sum(-1).numpy()),
        **lag_metrics(entry.v_min + entry.lag, sequences),
    }
    for name in ("prompt", "response"):
        found |= spread(f"{name}_length", batch.model[f"{name}s"].offsets().diff().numpy())
    if estimated is not None:
        found |= spread("critic/advantages", estimated.advantages[estimated.response_mask.bool()].numpy())
    return found


def env_scores(groups: Sequence[Group], names: Mapping[int, str]) -> dict[str, float]:
    """Mean score of each environment's sequences, as env_score/<name>; `names` are those of the environments' ids.

    Environments of one name are one: those that were started anew, or several beside each other.
    """
    scores: dict[str, list[np.ndarray]] = {}
    for group in groups:
        scores.setdefault(env_name(group, names), []).append(group.scores)
    return {f"env_score/{name}": float(np.concatenate(scores[name]).mean()) for name in sorted(scores)}


def env_name(group: Group, names: Mapping[int, str]) -> str:
    """The name that the group's environment registered with, of letters that metrics can have."""
    if group.env is None:
        return "unnamed"
    return re.sub(r"[^\w.-]+", "_", names.get(group.env, ""))[:64] or str(group.env)


def evaluation(fields: Mapping[str, str]) -> dict[str, float]:
    """An entry of kind "eval" as a tracker gets it: verl's name for accuracy on held-out problems, and whose version it is of."""
    env = re.sub(r"[^\w.-]+", "_", fields.get("env", "")) or "held_out"
    return {f"val-core/{env}/acc/mean@1": float(fields["accuracy"]), "val-aux/version": float(fields["version"])}


def under_verls_names(values: Mapping[str, float]) -> dict[str, float]:
    """A step's values as a tracker gets them: verl's names, and lachesis/… for what verl has no name for."""
    named = {name: value for name, value in values.items() if "/" in name}
    for name, value in values.items():
        if "/" not in name and name not in NOT_TOLD:
            named.setdefault(VERLS.get(name, f"lachesis/{name}"), value)
    return named


def mfu(flops_counter: Any, batch: TrainingBatch, seconds: float) -> float:
    """Share of the device's peak that the update's floating-point operations took, by verl's count; 0 where unknown."""
    lengths = batch.model["input_ids"].offsets().diff().tolist()
    done, promised = flops_counter.estimate_flops(lengths, seconds)
    return float(done / promised)

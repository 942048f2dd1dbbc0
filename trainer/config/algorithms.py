"""Which of verl's settings for algorithms can work here, and what follows from them. Imports no verl: refusals are quick."""

from __future__ import annotations

import copy

from omegaconf import DictConfig, OmegaConf

from lachesis.broker.errors import ConfigurationError, did_you_mean

# what verl has under these names; known here so that a misspelt one is refused before verl is imported
ESTIMATORS = (
    *("grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus"),
    *("reinforce_plus_plus_baseline", "gae", "remax", "gdpo", "optimal_token_baseline", "tir_optimal_token_baseline"),
)
LOSSES = (
    *("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"),
    "bypass_mode",
)
KL_TERMS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")  # also with a "+" behind
REJECTIONS = (
    *("token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3"),
)
NEEDS_MORE = {  # estimators whose further inputs rollouts from environments don't have
    "gae": "a critic",
    "remax": "greedy baseline rewards",
    "gdpo": "rewards by component",
    "optimal_token_baseline": "full token distributions",
    "tir_optimal_token_baseline": "full token distributions",
}


def check_algorithm(config: DictConfig) -> None:
    """Raise ConfigurationError, one line, for what can't be trained."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    _check_names(config)
    if algorithm.adv_estimator in NEEDS_MORE:
        raise ConfigurationError(
            f"algorithm.adv_estimator = {algorithm.adv_estimator!r}: needs {NEEDS_MORE[algorithm.adv_estimator]}, "
            "which this trainer does not have; use grpo, rloo, opo, reinforce_plus_plus, …"
        )
    if algorithm.filter_groups.enable and algorithm.filter_groups.metric != "reward":
        raise ConfigurationError(
            f"algorithm.filter_groups.metric = {algorithm.filter_groups.metric!r}: environments send scores only; use reward"
        )
    if algorithm.use_pf_ppo:
        raise ConfigurationError("algorithm.use_pf_ppo: needs a critic, which this trainer does not have")
    if algorithm.use_kl_in_reward and algorithm.kl_ctrl.type != "fixed":
        raise ConfigurationError(
            f"algorithm.kl_ctrl.type = {algorithm.kl_ctrl.type!r}: its coefficient is not in checkpoints; use fixed"
        )
    _check_distillation(config.distillation)
    _check_correction(algorithm.rollout_correction, actor.policy_loss.loss_mode)


def _check_names(config: DictConfig) -> None:
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    correction = algorithm.rollout_correction
    rejections = [one.strip() for one in str(correction.rollout_rs or "").split(",") if one.strip()]
    for name, values, known in (
        ("algorithm.adv_estimator", [algorithm.adv_estimator], ESTIMATORS),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", [actor.policy_loss.loss_mode], LOSSES),
        ("actor_rollout_ref.actor.loss_agg_mode", [actor.loss_agg_mode], tuple(SUMMED)),
        ("actor_rollout_ref.actor.kl_loss_type", [str(actor.kl_loss_type).removesuffix("+")], KL_TERMS),
        ("algorithm.kl_penalty", [str(algorithm.kl_penalty).removesuffix("+")], KL_TERMS),
        ("algorithm.rollout_correction.rollout_is", [correction.rollout_is], (None, "token", "sequence")),
        ("algorithm.rollout_correction.rollout_rs", rejections, REJECTIONS),
    ):
        for value in values:
            if value not in known:
                names = [str(one or "null") for one in known]
                raise ConfigurationError(
                    f"{name} = {value!r}: verl has {', '.join(names)}{did_you_mean(str(value), names)}"
                )


BY_GROUP = ("grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "opo")  # estimators that need no other
SUMS = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "gpg", "dro", "cispo", "bypass_mode")  # losses that add over sequences


# verl's loss_agg_mode → how replicas sum it, and what divides the step's sum
SUMMED = {
    "token-mean": ("token-sum", "tokens"),
    "token-sum": ("token-sum", "nothing"),
    "seq-mean-token-sum": ("seq-mean-token-sum", "sequences"),
    "seq-mean-token-mean": ("seq-mean-token-mean", "sequences"),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum-norm", "sequences"),
}


def summed_loss(config: DictConfig) -> tuple[DictConfig, str]:
    """The configuration with a loss that is summed, and what its sum is to be divided by: tokens | sequences | nothing."""
    mode, divide_by = SUMMED[config.actor_rollout_ref.actor.loss_agg_mode]
    config = copy.deepcopy(config)
    config.actor_rollout_ref.actor.loss_agg_mode = mode
    return config, divide_by


def check_elastic(config: DictConfig) -> None:
    """Raise ConfigurationError for what replicas that see some of the groups can't train as one trainer would."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    correction = algorithm.rollout_correction
    for name, value, wrong, why in (
        ("algorithm.adv_estimator", algorithm.adv_estimator, algorithm.adv_estimator not in BY_GROUP,
         f"advantages need the whole batch, and a replica sees some of the groups; use {', '.join(BY_GROUP)}"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", actor.policy_loss.loss_mode,
         actor.policy_loss.loss_mode not in SUMS,
         f"this loss of a batch is not the sum of its groups'; use {', '.join(SUMS)}"),
        ("actor_rollout_ref.actor.loss_agg_mode", actor.loss_agg_mode, actor.loss_agg_mode not in SUMMED,
         f"use {', '.join(SUMMED)}"),
        ("algorithm.rollout_correction.rollout_is_batch_normalize", correction.rollout_is_batch_normalize,
         bool(correction.rollout_is_batch_normalize), "weights need the whole batch, and a replica sees some of the groups"),
        ("distillation.enabled", config.distillation.enabled, bool(config.distillation.enabled),
         "its term of the loss is not divided between replicas"),
    ):  # fmt: skip
        if wrong:
            raise ConfigurationError(
                f"{name} = {value!r}: not with lachesis.elastic ({why}); or lachesis.elastic=false"
            )


def _check_distillation(distillation: DictConfig) -> None:
    only = {"loss_mode": "forward_kl_topk", "use_policy_gradient": False, "log_prob_min_clamp": None}
    for name, value in only.items():
        if distillation.enabled and distillation.distillation_loss[name] != value:
            raise ConfigurationError(
                f"distillation.distillation_loss.{name} = {distillation.distillation_loss[name]!r}: environments send a "
                f"teacher's likeliest tokens, for which only {value!r} works"
            )


def _check_correction(correction: DictConfig, loss_mode: str) -> None:
    if not correction.bypass_mode or loss_mode in ("vanilla", "bypass_mode"):
        return
    # these are the business of the loss "bypass_mode", which another one takes the place of
    rest = {"rollout_is": None, "rollout_rs": None, "loss_type": "ppo_clip"}
    for name, only in rest.items():
        if correction[name] != only:
            raise ConfigurationError(
                f"algorithm.rollout_correction.{name} = {correction[name]!r}: has no effect with bypass_mode and the loss "
                f"{loss_mode!r}; use correction=bypass_ppo_clip, or a decoupled correction"
            )


def check_with_verl(config: DictConfig) -> None:
    """Raise ValueError or NotImplementedError where verl knows no such loss, estimator or correction. Imports verl."""
    import torch
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn, kl_penalty
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    get_adv_estimator_fn(algorithm.adv_estimator)
    get_policy_loss_fn(actor.policy_loss.loss_mode)
    nothing, correction = torch.zeros(1, 1), algorithm.rollout_correction
    for name in (actor.kl_loss_type, algorithm.kl_penalty):
        kl_penalty(nothing, nothing, name)
    names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold", "rollout_is_batch_normalize")
    compute_rollout_correction_and_rejection_mask(
        nothing, nothing, nothing + 1, **{name: correction[name] for name in names}
    )


def settle_algorithm(config: DictConfig, max_token_len: int) -> None:
    """Set, in `config`, what verl's own drivers set from other values."""
    actor, correction = config.actor_rollout_ref.actor, config.algorithm.rollout_correction
    if correction.bypass_mode and actor.policy_loss.loss_mode == "vanilla":  # verl's apply_bypass_mode
        OmegaConf.update(actor.policy_loss, "loss_mode", "bypass_mode")
        OmegaConf.update(actor.policy_loss, "rollout_correction", correction, force_add=True)
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        # verl would take the longest response of each micro-batch: another constant every time
        OmegaConf.update(actor, "loss_scale_factor", max_token_len)

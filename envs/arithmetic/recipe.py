"""Settings that take the tiny model from a third of the answers to nearly all held-out problems right on two cores."""

from lachesis.envs.task import Recipe

RECIPE = Recipe(
    steps=80,
    batch_size=256,
    group_size=8,
    max_token_len=32,
    context_length=64,
    max_workers=32,
    max_batches_offpolicy=1,
    trainer={
        "actor_rollout_ref.actor.optim.lr": 5e-4,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.min_lr_ratio": 0.1,
        "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    },
)

"""Settings for an instruction-tuned model of about half a billion parameters on one GPU."""

from lachesis.envs.task import Recipe

RECIPE = Recipe(
    steps=200,
    batch_size=256,
    group_size=8,
    max_token_len=1024,
    context_length=1024,
    max_workers=64,
    max_batches_offpolicy=1,
    trainer={"actor_rollout_ref.actor.optim.lr": 1e-6, "actor_rollout_ref.actor.clip_ratio_high": 0.28},
)

"""GSM8K as an Atropos environment. `python -m lachesis.envs.gsm8k serve` runs it without Lachesis's settings."""

from __future__ import annotations

from atroposlib.envs.server_handling.server_manager import APIServerConfig

from lachesis.envs.gsm8k.recipe import RECIPE
from lachesis.envs.single_turn import SingleTurnConfig, SingleTurnEnv


class Env(SingleTurnEnv):
    """Word problems: an answer that math-verify finds equal scores 1, others 0."""

    name = "gsm8k"

    @classmethod
    def config_init(cls) -> tuple[SingleTurnConfig, list[APIServerConfig]]:
        config = SingleTurnConfig(
            group_size=RECIPE.group_size,
            max_token_length=RECIPE.max_token_len,
            max_batches_offpolicy=RECIPE.max_batches_offpolicy,
            max_num_workers=RECIPE.max_workers,
            ensure_scores_are_not_same=False,
            steps_per_eval=0,
            total_steps=-1,
            use_wandb=False,
            wandb_name=cls.name,
        )
        return config, [APIServerConfig(base_url="http://127.0.0.1:9000/v1", api_key="none", server_type="sglang")]

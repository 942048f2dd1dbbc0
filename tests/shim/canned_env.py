"""An Atropos environment on an unmodified atroposlib that needs no inference: `canned_env.py SHIM_URL TOKENIZER STEPS`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig

LENGTH = 400  # tokens: long enough that posts are compressed


class CannedEnv(BaseEnv):
    name = "canned"

    async def setup(self) -> None:
        self.made = 0

    async def get_next_item(self) -> int:
        self.made += 1
        return self.made

    async def collect_trajectories(self, item: int) -> tuple[Any, list[Any]]:
        await asyncio.sleep(0.01)
        tokens = [[item, index, *range(LENGTH)] for index in range(self.config.group_size)]
        masks = [[-100, *row[1:]] for row in tokens]
        return {"tokens": tokens, "masks": masks, "scores": [float(index) for index in range(len(tokens))]}, []

    async def evaluate(self, *_: Any, **__: Any) -> None:
        pass


if __name__ == "__main__":
    url, tokenizer, steps = sys.argv[1:]
    config = BaseEnvConfig(
        group_size=4,
        total_steps=int(steps),
        rollout_server_url=url,
        tokenizer_name=tokenizer,
        use_wandb=False,
        wandb_name="canned",
        max_num_workers=4,
        max_batches_offpolicy=2,
        max_token_length=LENGTH + 2,
    )
    server = APIServerConfig(base_url="http://127.0.0.1:9/v1", api_key="x", model_name="none")
    env = CannedEnv(config, [server])
    asyncio.run(env.env_manager())
    print(f"sent by {env.wandb_prepend}, id {env.env_id}, checkpoints in {env.checkpoint_dir}")

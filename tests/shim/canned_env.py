"""Atropos environments on an unmodified atroposlib: `canned_env.py KIND SHIM_URL TOKENIZER STEPS`.

canned: posts one group at a time, and needs no inference. sampled: the same through a ManagedServer, which asks a small
server of SGLang's /generate in this process, so groups have the log-probs of the tokens. turns: posts lists of groups of
several turns, as environments of games do, with messages and keys of their own.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

from aiohttp import web
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig

LENGTH = 400  # tokens: long enough that posts are compressed
TURNS = 3


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


class SampledEnv(CannedEnv):
    async def collect_trajectories(self, item: int) -> tuple[Any, list[Any]]:
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            await managed.completion(prompt=str(item), n=self.config.group_size, max_tokens=LENGTH, temperature=1.0)
            nodes = managed.get_state()["nodes"]
        return {
            "tokens": [node.tokens for node in nodes],
            "masks": [node.masked_tokens for node in nodes],
            "inference_logprobs": [node.logprobs for node in nodes],
            "scores": [float(index) for index in range(len(nodes))],
        }, []


class TurnsEnv(CannedEnv):
    """Every item is one game; each of its turns is a group of the tries that were made at it."""

    async def collect_trajectories(self, item: int) -> tuple[Any, list[Any]]:
        await asyncio.sleep(0.01)
        return [self.turn(item, turn) for turn in range(TURNS)], []

    def turn(self, item: int, turn: int) -> dict[str, Any]:
        tries = range(self.config.group_size)
        asked, answered = [1, 2, 3] * 20, [4, 5, 6, 7] * 20
        tokens = [[item * TURNS + turn, index, *((asked + answered) * (turn + 1))] for index in tries]
        unseen = [-100] * len(asked)
        return {
            "tokens": tokens,
            "masks": [[-100, -100, *((unseen + answered) * (turn + 1))] for _ in tries],
            "scores": [turn - index / 3 for index in tries],
            "advantages": None,
            "messages": [
                [{"role": "user", "content": f"deal {turn}", "reward": None}, {"role": "assistant", "content": [index]}]
                for index in tries
            ],
            "overrides": [{"set_advantage_to_zero": index == 0} for index in tries],
            "group_overrides": {"group_size": len(tries)},
            "seed": item,  # this and the next are keys that no trainer knows of
            "parsed_actions": [["hit"] for _ in tries],
        }


KINDS: dict[str, type[CannedEnv]] = {"canned": CannedEnv, "sampled": SampledEnv, "turns": TurnsEnv}


async def generate(request: web.Request) -> web.Response:
    """SGLang's answer to `input_ids`: random tokens and their log-probs."""
    asked = (await request.json())["sampling_params"]
    answers = []
    for _ in range(asked.get("n", 1)):
        sampled = [[-random.random(), random.randrange(1000), None] for _ in range(asked["max_new_tokens"])]
        answers.append({"meta_info": {"output_token_logprobs": sampled, "finish_reason": {"type": "length"}}})
    return web.json_response(answers)


async def run(kind: str, url: str, tokenizer: str, steps: int) -> None:
    app = web.Application()
    app.router.add_post("/generate", generate)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    config = BaseEnvConfig(
        group_size=4,
        total_steps=steps,
        rollout_server_url=url,
        tokenizer_name=tokenizer,
        use_wandb=False,
        wandb_name=kind,
        max_num_workers=4,
        max_batches_offpolicy=2,
        max_token_length=LENGTH + TURNS * 140,
    )
    server = APIServerConfig(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="x",
        model_name=tokenizer,
        server_type="sglang",
        health_check=False,
    )
    env = KINDS[kind](config, [server])
    await env.env_manager()
    print(f"sent by {env.wandb_prepend}, id {env.env_id}, checkpoints in {env.checkpoint_dir}")


if __name__ == "__main__":
    chosen, address, tokens, count = sys.argv[1:5]
    asyncio.run(run(chosen, address, tokens, int(count)))

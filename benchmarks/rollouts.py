"""Two environments as users of atroposlib write them; they know nothing of Lachesis. `rollouts.py single|turns serve …`.

Both sample through atroposlib's ManagedServer, which asks a server's /generate for token ids and log-probs and keeps
what was generated: single asks once, turns goes on with the same conversation.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup

TURNS = 3
TOKENS = {"single": 48, "turns": 24}  # of an answer, at most


def score(text: str) -> float:
    """Share of the answer that is ASCII: a random model's answers differ in it."""
    return sum(character.isascii() for character in text) / max(1, len(text))


class SingleTurnEnv(BaseEnv):
    name = "single"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        config = BaseEnvConfig(
            group_size=4,
            max_token_length=448,
            max_num_workers=8,
            total_steps=100_000,
            use_wandb=False,
            wandb_name=cls.name,
            ensure_scores_are_not_same=False,
        )
        return config, [APIServerConfig(base_url="http://127.0.0.1:9000/v1", api_key="x", server_type="sglang")]

    async def setup(self) -> None:
        self.asked = 0

    async def get_next_item(self) -> str:
        self.asked += 1
        return f"{self.name} {self.asked}: say something. "

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            answer = await managed.chat_completion(
                messages=[{"role": "user", "content": item}],
                n=self.config.group_size,
                max_tokens=TOKENS[self.name],
                temperature=1.0,
            )
            nodes = managed.get_state()["nodes"]
        return group(nodes, [score(choice.message.content) for choice in answer.choices]), []

    async def evaluate(self, *_: Any, **__: Any) -> None:
        pass


class MultiTurnEnv(SingleTurnEnv):
    """What the user says depends on what was answered. All turns of a conversation are one sequence, all are trained."""

    name = "turns"

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        made = await asyncio.gather(*(self.converse(item) for _ in range(self.config.group_size)))
        return group([node for node, _ in made], [reward for _, reward in made]), []

    async def converse(self, item: str) -> tuple[Any, float]:
        messages, text = [{"role": "user", "content": item}], ""
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            for turn in range(TURNS):
                answer = await managed.chat_completion(
                    messages=messages, n=1, max_tokens=TOKENS[self.name], temperature=1.0
                )
                text = answer.choices[0].message.content
                messages.append({"role": "assistant", "content": text})
                messages.append({"role": "user", "content": f"\n{turn}: {len(text)} letters. Go on: "})
            return managed.get_state()["nodes"][-1], score(text)


def group(nodes: list[Any], scores: list[float]) -> ScoredDataGroup:
    return ScoredDataGroup(
        tokens=[node.tokens for node in nodes],
        masks=[node.masked_tokens for node in nodes],
        inference_logprobs=[node.logprobs for node in nodes],
        scores=scores,
    )


if __name__ == "__main__":
    {"single": SingleTurnEnv, "turns": MultiTurnEnv}[sys.argv.pop(1)].cli()

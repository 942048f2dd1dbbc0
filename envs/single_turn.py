"""A single-turn task as an Atropos environment: plain atroposlib, which knows nothing of Lachesis."""

from __future__ import annotations

import asyncio
from typing import Any

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, ScoredDataGroup
from atroposlib.envs.server_handling.server_manager import APIServerConfig
from pydantic import Field

from lachesis.envs.task import Problem, Recipe, Task


class SingleTurnConfig(BaseEnvConfig):
    """Atropos' settings, and which problems."""

    seed: int = Field(default=0, description="decides the order of the training problems")
    data: str | None = Field(default=None, description="file of problems, for tasks that take one")
    max_new_tokens: int = Field(default=0, description="longest answer, in tokens (0: the task's)")
    eval_problems: int = Field(default=200, description="held-out problems an evaluation asks, at most")


class SingleTurnEnv(BaseEnv):
    """Asks a problem `group_size` times, grades each answer, and posts tokens, masks, log-probs and scores."""

    name = ""
    recipe: Recipe
    env_config_cls = SingleTurnConfig
    task: Task

    @staticmethod
    def make_task(data: str | None) -> Task:
        """The problems; `data` names a file of them, for tasks that take one."""
        raise NotImplementedError

    @classmethod
    def config_init(cls) -> tuple[SingleTurnConfig, list[APIServerConfig]]:
        """The recipe of this environment, a shim and a front door on this machine."""
        recipe = cls.recipe
        config = SingleTurnConfig(
            group_size=recipe.group_size,
            max_token_length=recipe.max_token_len,
            max_batches_offpolicy=recipe.max_batches_offpolicy,
            max_num_workers=recipe.max_workers,
            ensure_scores_are_not_same=False,  # groups all right or all wrong count, else the reward would be biased
            steps_per_eval=0,
            total_steps=-1,  # as many as the trainer says
            use_wandb=False,
            wandb_name=cls.name,
        )
        server = APIServerConfig(
            base_url="http://127.0.0.1:9000/v1",
            api_key="none",
            server_type="sglang",
            health_check=False,  # the front door lets requests wait for a server; a probe would only cost generations
        )
        return config, [server]  # a list, because atroposlib replaces a bare one's address by ports of its own choice

    async def setup(self) -> None:
        self.task = self.make_task(self.config.data)
        self._training = self.task.training(self.config.seed)
        self._max_new_tokens = self.config.max_new_tokens or self.task.max_new_tokens
        self._posted = 0
        self._held_out_accuracy: float | None = None

    async def get_next_item(self) -> Problem:
        return next(self._training)

    async def collect_trajectories(self, item: Problem) -> tuple[ScoredDataGroup, list[Problem]]:
        problem = Problem(*item)
        sampling = {
            "n": self.config.group_size,
            "max_tokens": self._max_new_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            texts = await self._ask(managed, problem, **sampling)
            nodes = managed.get_state()["nodes"]
        group = ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            inference_logprobs=[node.logprobs for node in nodes],
            scores=[self.task.score(problem, text) for text in texts],
        )
        return group, []

    async def _ask(self, server: Any, problem: Problem, **sampling: Any) -> list[str]:
        """The texts of `n` answers."""
        if self.task.chat:
            messages = [{"role": "user", "content": problem.prompt}]
            answer = await server.chat_completion(messages=messages, **sampling)
            return [choice.message.content or "" for choice in answer.choices]
        answer = await server.completion(prompt=problem.prompt, **sampling)
        return [choice.text for choice in answer.choices]

    # -- evaluation -----------------------------------------------------------------------------------------------

    async def evaluate(self, *_: Any, **__: Any) -> None:
        """Greedy accuracy on held-out problems, logged the way Atropos logs evaluations."""
        sampling = {"n": 1, "max_tokens": self._max_new_tokens, "temperature": 0.0, "split": "eval"}

        async def grade(problem: Problem) -> float:
            return self.task.score(problem, (await self._ask(self.server, problem, **sampling))[0])

        # all at once: the server's configuration says how many of them are under way
        scores = await asyncio.gather(*map(grade, self.task.held_out()[: self.config.eval_problems]))
        self._held_out_accuracy = sum(scores) / len(scores)
        await self.evaluate_log({"eval/accuracy": self._held_out_accuracy})

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        metrics = dict(wandb_metrics or {})
        if self._held_out_accuracy is not None:
            metrics["eval/accuracy"] = self._held_out_accuracy
            self._held_out_accuracy = None
        await super().wandb_log(metrics)

    # -- pacing ---------------------------------------------------------------------------------------------------

    async def get_status(self) -> None:
        """Count what was posted while the status was on its way as queued.

        atroposlib takes a group whose post ended in that moment for neither queued nor in work, starts another, and so
        makes more than a batch: the surplus would be trained a step late.
        """
        before = self._posted
        await super().get_status()
        self.status_dict["queue_size"] += self._posted - before

    async def handle_send_to_api(self, *args: Any, **kwargs: Any) -> None:
        await super().handle_send_to_api(*args, **kwargs)
        self._posted += 1

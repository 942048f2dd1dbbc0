"""A bandit played by a language model: one prompt, one token of answer, a reward for each token of the vocabulary.

Rewards are sent as advantages, without a baseline. That is where stale samples mislead: the uncorrected gradient is that
of fitting what the old policy did, weighted by reward, which is at rest at (old policy × reward), so that an arm can gain on another by no
more than the quotient of their rewards within `lag` versions. Weights by the present policy's ratio make it the policy gradient again.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trainer_kit import stored

from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.trainer.data.collate import to_batch

if TYPE_CHECKING:
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.engine.verl_engine import Engine

PROMPT = [1, 2]


class Bandit:
    """`rewards`, float32 (arms,): one per token. What samples is the policy of `lag` versions ago, as kept weights."""

    def __init__(self, engine: Engine, learner: Learner, rewards: Tensor, *, lag: int, seed: int) -> None:
        self._engine, self._learner, self._rewards = engine, learner, rewards
        self._versions: deque[dict[str, Tensor]] = deque(maxlen=lag + 1)
        self._random = torch.Generator().manual_seed(seed)
        self._sampler: Any = self._model()

    def play(self, steps: int, *, sequences: int) -> float:
        """Train for `steps`; the expected regret of the last policy, in units of reward."""
        self._versions.append(self._weights())
        for _ in range(steps):
            log_probs = self._policy(self._versions[0])
            these = self._group(log_probs, sequences)
            self._learner.step(to_batch([these], vocab_size=len(self._rewards), max_tokens=8))
            self._versions.append(self._weights())
        return float(self._rewards.max() - self._policy(self._versions[-1]).exp() @ self._rewards)

    def _group(self, log_probs: Tensor, sequences: int) -> Group:
        arms = torch.multinomial(log_probs.exp(), sequences, replacement=True, generator=self._random).tolist()
        rewards = [self._rewards[arm].item() for arm in arms]
        unknown = [1.0] * len(PROMPT)
        return stored(
            ScoredGroup(
                tokens=[[*PROMPT, arm] for arm in arms],
                masks=[[-100] * len(PROMPT) + [arm] for arm in arms],
                scores=rewards,
                inference_logprobs=[[*unknown, log_probs[arm].item()] for arm in arms],
                advantages=[[0.0] * len(PROMPT) + [reward] for reward in rewards],
            )
        )

    def _policy(self, weights: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of the arms, float32 (arms,), in a model of Hugging Face's own."""
        self._sampler.load_state_dict(weights)
        with torch.no_grad():
            found: Tensor = self._sampler(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        return found

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._engine.worker.engine.get_per_tensor_param()[0]}

    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(self._engine.worker.model_config.hf_config).eval()

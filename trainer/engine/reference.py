"""The reference policy of KL terms: the model that training starts from, frozen."""

from __future__ import annotations

import copy
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict


def needs_reference(config: DictConfig) -> bool:
    return bool(config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward)


class Reference:
    """verl's forward-only worker, configured by actor_rollout_ref.ref. It is built when it is first asked, since environments may send
    the reference's log-probs themselves. With LoRA, as in verl, it is the trained model with its adapter off.
    """

    def __init__(self, config: DictConfig, actor_worker: Any) -> None:
        self._config, self._actor_worker = config.actor_rollout_ref, actor_worker
        self._has_adapter = actor_worker.engine._is_lora
        self._worker: Any = None

    @property
    def worker(self) -> Any:
        """verl.workers.engine_workers.TrainingWorker; building it takes as long as loading the model."""
        if self._has_adapter:
            return self._actor_worker
        if self._worker is None:
            from verl.workers.engine_workers import ActorRolloutRefWorker

            with torch.random.fork_rng():  # so that it does not matter to the training when it is built
                outer = ActorRolloutRefWorker(copy.deepcopy(self._config), role="ref")
                outer.init_model()
            self._worker = outer.ref
        return self._worker

    def infer(self, data: TensorDict) -> TensorDict:
        """The worker's infer_batch."""
        if self._has_adapter:
            from verl.utils import tensordict_utils as tu

            tu.assign_non_tensor(data, no_lora_adapter=True)
        return self.worker.infer_batch(data)

"""verl's engine in this process: the model, its optimizer and the loss, as the configuration says."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from lachesis.broker.errors import ConfigurationError
from lachesis.trainer.config.algorithms import check_with_verl
from lachesis.trainer.engine.distributed import Ranks, init_process_group
from lachesis.trainer.engine.reference import Reference, needs_reference

# what numpy's random state, which verl keeps in a checkpoint, is pickled as
RANDOM_STATE: list[Any] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np.empty(0).__reduce__()[0],  # numpy's _reconstruct, whose module has had two names
]
_ONE_PROCESS = {  # what torchrun would set; verl reads it whoever starts the process
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@dataclass(frozen=True)
class Engine:
    worker: Any  # verl.workers.engine_workers_tinker.TinkerTrainingWorker
    actor: Any  # verl.workers.config.FSDPActorConfig
    ranks: Ranks
    tokenizer: Any
    flops_counter: Any  # verl's, on an accelerator; else None
    vocab_size: int
    tied: bool  # the output layer is the embedding
    distillation: Any | None  # verl.workers.config.DistillationLossConfig, where the loss has that term
    reference: Reference | None  # where a KL term needs one
    pad_small_steps: bool  # no flash attention, no sequence parallelism: see Learner


def device_name() -> str:
    """cuda where torch finds one, else cpu; VERL_PLATFORM overrides."""
    named = os.environ.get("VERL_PLATFORM", "")
    return "cpu" if named == "cpu" or (not named and not torch.cuda.is_available()) else "cuda"


def build_engine(config: DictConfig) -> Engine:
    """Load the model and build its optimizer. Takes seconds, most of them imports.

    Raises ConfigurationError for values that verl's own configuration classes refuse.
    """
    if config.lachesis.device != device_name():
        raise ConfigurationError(f"device={config.lachesis.device}: torch finds {device_name()} only")
    if device_name() == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"  # before verl is imported: it looks once
    for name, value in _ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
    _seed(config.lachesis.seed)
    load_tensors_only()

    with _importing_much():
        import verl.workers.engine  # noqa: F401
        from hydra.errors import InstantiationException
        from verl.trainer.distillation.losses import distillation_ppo_loss
        from verl.utils.config import omega_conf_to_dataclass
        from verl.utils.device import get_device_name, get_nccl_backend
        from verl.workers.config import DistillationConfig, TrainingWorkerConfig
        from verl.workers.engine_workers_tinker import TinkerTrainingWorker
        from verl.workers.utils.losses import ppo_loss

        from lachesis.trainer.verl_plugin import register_cpu_engine

    if get_device_name() == "cpu":
        register_cpu_engine()
    # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses
    init_process_group(get_device_name(), get_nccl_backend())

    try:
        check_with_verl(config)
        model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        distillation = omega_conf_to_dataclass(config.distillation.distillation_loss)
    except (InstantiationException, AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigurationError(f"verl refuses the configuration: {_one_line(error.__cause__ or error)}") from error
    actor.model_config = model
    engine = actor.engine
    engine.use_dynamic_bsz = actor.use_dynamic_bsz
    engine.max_token_len_per_gpu = engine.infer_max_token_len_per_gpu = actor.ppo_max_token_len_per_gpu
    engine.micro_batch_size_per_gpu = engine.infer_micro_batch_size_per_gpu = actor.ppo_micro_batch_size_per_gpu
    worker = TinkerTrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
    )
    worker.reset()
    loss = partial(ppo_loss, config=actor)
    if config.distillation.enabled:  # to verl "enabled" means that it runs the teacher itself
        settings = DistillationConfig(enabled=False, distillation_loss=distillation)
        loss = partial(distillation_ppo_loss, config=actor, distillation_config=settings)
    worker.set_loss_fn(loss)
    attention = config.actor_rollout_ref.model.override_config.attn_implementation
    return Engine(
        worker,
        actor,
        ranks=Ranks(),
        tokenizer=model.tokenizer,
        flops_counter=None if get_device_name() == "cpu" else worker.flops_counter,
        vocab_size=model.hf_config.get_text_config().vocab_size,
        tied=bool(model.hf_config.tie_word_embeddings),
        distillation=distillation if config.distillation.enabled else None,
        reference=Reference(config, worker) if needs_reference(config) else None,
        pad_small_steps=not attention.startswith("flash")
        and not model.use_fused_kernels
        and actor.use_dynamic_bsz
        and engine.ulysses_sequence_parallel_size == 1,
    )


def load_tensors_only() -> None:
    """Have torch.load take nothing but tensors and plain values in this process, whoever calls it and however.

    verl loads checkpoints with weights_only=False, which would run what a pickle says.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals(RANDOM_STATE)


@contextmanager
def _importing_much() -> Iterator[None]:
    """Import without collecting garbage, an eighth of the time, and never walk what was imported again afterwards.

    Import-time warnings are dropped: verl has one for every engine that is not installed.
    """
    gc.disable()
    try:
        with warnings.catch_warnings(record=True):
            yield
    finally:
        gc.enable()
        gc.freeze()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""The weights in memory, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lachesis.trainer.engine.verl_engine import Engine


def published_tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in memory under Hugging Face's names; without the output layer where it is the embedding.

    A LoRA adapter is merged into them, and out of the model again only when the last one has been taken.
    """
    inner = engine.worker.engine
    for name, tensor in _merged(inner) if inner._is_lora else inner.get_per_tensor_param()[0]:
        if not (engine.tied and name == "lm_head.weight"):
            yield name, tensor


def _merged(inner: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What verl's engine exports with lora.merge, but in the dtype it has: verl rounds to bfloat16."""
    from torch.distributed.tensor import DTensor
    from verl.utils.fsdp_utils import (
        load_fsdp_model_to_gpu,
        merged_lora_context,
        normalize_peft_param_name,
        offload_fsdp_model_to_cpu,
    )
    from verl.utils.model import convert_weight_keys

    module = inner.module
    if inner.is_param_offload_enabled:
        load_fsdp_model_to_gpu(module)
    try:
        with merged_lora_context(module, backup_adapters=True):
            tensors = convert_weight_keys(normalize_peft_param_name(module.state_dict()), module)
            for name, tensor in tensors.items():
                # a copy: the parameter's own memory gets the base weights back
                yield name, tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()
    finally:
        if inner.is_param_offload_enabled:
            offload_fsdp_model_to_cpu(module)

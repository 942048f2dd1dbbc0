"""LoRA: the adapter alone is trained, and what is published is the whole model, as peft itself merges it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from trainer_kit import scored_group, stored

from lachesis.trainer.data.collate import to_batch

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.engine.verl_engine import Engine

pytestmark = pytest.mark.verl
RANK, ALPHA = 4, 12
Built = Callable[..., "tuple[Engine, DictConfig]"]


def batch() -> Any:
    rng = random.Random(3)
    return to_batch([stored(scored_group(rng, turns=2)) for _ in range(4)], vocab_size=320, max_tokens=64)


@pytest.fixture
def trained(built: Built) -> tuple[Engine, Learner, dict[str, Tensor]]:
    """An adapter after three steps, and all parameters before them."""
    from lachesis.trainer.algo.learner import Learner

    engine, config = built(f"actor_rollout_ref.model.lora_rank={RANK}", f"actor_rollout_ref.model.lora_alpha={ALPHA}")
    learner, before = Learner(engine, config.algorithm), parameters(engine)
    for _ in range(3):
        learner.step(batch())
    return engine, learner, before


def parameters(engine: Engine) -> dict[str, Tensor]:
    named = engine.worker.engine.module.named_parameters()
    return {name: parameter.detach().full_tensor().clone() for name, parameter in named}


def test_only_the_adapter_is_trained(trained: tuple[Engine, Learner, dict[str, Tensor]]) -> None:
    engine, _, before = trained
    after = parameters(engine)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert len(changed) == 28  # A and B of 7 layers, twice


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_published_is_what_peft_merges(
    trained: tuple[Engine, Learner, dict[str, Tensor]], tiny_model: Path, tmp_path: Path, dtype: str
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lachesis.trainer.engine.export import published_tensors
    from lachesis.trainer.weights.versions import VersionStore

    engine, learner, _ = trained
    before = parameters(engine)
    entry = VersionStore(tmp_path, tiny_model, dtype=dtype).write(3, 3, 0, published_tensors(engine))
    after = parameters(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    missing = adapted.load_state_dict({name: value for name, value in before.items() if "lora_" in name}, strict=False)
    assert not missing.unexpected_keys
    expected = adapted.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(entry.uri, dtype=torch.float32, attn_implementation="eager")
    tensors = found.state_dict()
    assert tensors.keys() == expected.keys()
    tolerance = {"fp32": 1e-6, "bf16": 1e-2}[dtype]
    assert all((tensors[name] - expected[name]).abs().max() <= tolerance for name in expected)
    if dtype == "fp32":
        these = batch()
        ids, start = these.model["input_ids"].unbind()[0], len(these.model["prompts"].unbind()[0])
        with torch.no_grad():
            theirs = found(ids[None]).logits[0].log_softmax(-1)[start - 1 : -1].gather(-1, ids[start:, None])[:, 0]
        mine = learner.log_probs(these)[0][0, : len(theirs)]
        assert (mine - theirs).abs().max() <= 1e-5

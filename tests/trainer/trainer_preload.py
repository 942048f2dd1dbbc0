"""Imported by the process that trainers are forked from: what takes each of them ten seconds otherwise."""

import verl.workers.engine  # noqa: F401
from transformers import Qwen2Config
from verl.utils.model import get_hf_auto_model_class

import lachesis.trainer.main
import lachesis.trainer.replica  # noqa: F401

get_hf_auto_model_class(Qwen2Config(architectures=["Qwen2ForCausalLM"]))  # imports every model that transformers knows

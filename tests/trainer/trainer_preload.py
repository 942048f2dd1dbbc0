"""Imported by the process that trainers are forked from: what takes each of them ten seconds otherwise."""

import verl.workers.engine
import verl.workers.engine_workers_tinker  # noqa: F401
from transformers import Qwen2Config
from verl.utils.model import get_hf_auto_model_class

import lachesis.trainer.elastic.leader
import lachesis.trainer.solo
import lachesis.trainer.weights.checkpoint  # noqa: F401
from lachesis.trainer.config.compose import compose_config

get_hf_auto_model_class(Qwen2Config(architectures=["Qwen2ForCausalLM"]))  # imports every model that transformers knows
compose_config((), device="cpu")  # reads verl's files of configuration

"""A model folder in Hugging Face's layout, as far as an SGLang server and its front door need to know it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.weights.model_files import SERVED_TOKENIZER_FILES
from lachesis.inference.versions.safetensors_reader import read_header

MAX_CONFIG = 64 << 20  # bytes of config.json that are read
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class ModelFolder(Struct, frozen=True):
    """What the folder says about its model. Shapes are those of the files; 0 and "" where it doesn't say."""

    folder: Path
    vocab_size: int
    context_length: int  # tokens
    dtype: str  # torch's name
    tied: bool  # the output layer is the embedding, so `lm_head.weight` may or may not be stored
    shapes: dict[str, tuple[int, ...]]


def read_model_folder(folder: Path) -> ModelFolder:
    """Raises ConfigurationError, saying what is missing, unless SGLang can start from the folder."""
    folder = folder.absolute()
    try:
        with (folder / "config.json").open("rb") as file:
            config = msgspec.json.decode(file.read(MAX_CONFIG), type=dict[str, Any])
    except FileNotFoundError:
        raise ConfigurationError(f"model = {str(folder)!r}: it has no config.json, so it is no model folder") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"model = {str(folder)!r}: its config.json can't be read: {error}") from None
    if not any((folder / name).is_file() for name in SERVED_TOKENIZER_FILES):
        raise ConfigurationError(
            f"model = {str(folder)!r}: it has no tokenizer (none of {', '.join(SERVED_TOKENIZER_FILES)}); copy the tokenizer's files there"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(f"model = {str(folder)!r}: it has no weights (*.safetensors)")
    text = config.get("text_config") or config  # models that also see or hear keep the language part's figures there
    if not isinstance(text, dict):
        raise ConfigurationError(f"model = {str(folder)!r}: text_config in its config.json: must be an object")
    return ModelFolder(
        folder=folder,
        vocab_size=_count(folder, text, "vocab_size"),
        context_length=0 if text.get("rope_scaling") else _count(folder, text, "max_position_embeddings"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        tied=bool(config.get("tie_word_embeddings", False)),
        shapes={name: tensor.shape for path in files for name, tensor in read_header(path)[0].items()},
    )


def _count(folder: Path, config: dict[str, Any], name: str) -> int:
    """0 where the configuration does not say."""
    value = config.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 40):
        shown = repr(value)[:80]
        raise ConfigurationError(
            f"model = {str(folder)!r}: {name} = {shown} in its config.json: must be a whole number"
        )
    return value or 0


def is_hub_name(model: str) -> bool:
    """Whether `model` names a model on the hub: ORGANISATION/NAME, and no such folder here."""
    return _HUB_NAME.fullmatch(model) is not None and not model.startswith(".") and not Path(model).exists()


def download(model: str, python: str) -> Path:
    """The local folder of a model on the hub, fetched if need be by SGLang's interpreter, which has the client for it.

    Raises ConfigurationError, with the client's last line, if it can't be had.
    """
    code = f"from huggingface_hub import snapshot_download as s; print(s({model!r}, allow_patterns={list(_WANTED)!r}))"
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ))
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ConfigurationError(f"model = {model!r}: no such folder, and not to be had from the hub: {reason}")
    return Path(lines[-1])

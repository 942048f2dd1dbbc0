"""The model to train: a folder of this machine, or a name that the Hugging Face hub knows."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.weights.model_files import TOKENIZER_FILES

WEIGHT_FILES = ("*.safetensors", "*.bin")


def find_model(path: str) -> Path:
    """The folder of a model that is on this machine, or a name that the Hugging Face hub knows; checked."""
    where = f"actor_rollout_ref.model.path = {path!r}"
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise ConfigurationError(f"{where}: {error}") from None
    if not folder.is_dir():
        folder = _from_hub(path)
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{where}: holds no config.json, so it is not a Hugging Face model folder")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigurationError(
            f"{where}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "save it there with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ConfigurationError(f"{where}: holds no weights (none of {', '.join(WEIGHT_FILES)})")
    return folder.absolute()


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ConfigurationError(f"actor_rollout_ref.model.path = {name!r}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.pth", "*.gguf", "*.onnx", "original/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"actor_rollout_ref.model.path = {name!r}: no such folder, and not to be had from the Hugging Face hub "
            f"({type(error).__name__})"
        ) from error


def max_positions(model_dir: Path) -> int:
    """The most tokens of a sequence that the model in the folder takes."""
    where = f"actor_rollout_ref.model.path = {str(model_dir)!r}"
    try:
        raw = json.loads((model_dir / "config.json").read_text())
        text = raw.get("text_config") or raw
        return int(text.get("max_position_embeddings") or raw.get("n_positions") or 1 << 30)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{where}: its config.json can't be read: {error}") from None

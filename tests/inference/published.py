"""A tiny model made on the spot, and versions of it published as a trainer would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

from lachesis.broker import Broker
from lachesis.broker.records.versions import FileInfo, Manifest, TensorInfo, WeightsEntry

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT = 320, 64, 2, 4, 2, 512
SPECIALS = ("<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path, seed: int = 0) -> Path:
    """A two-layer Qwen2 in float32 with a byte-level tokenizer, in Hugging Face's layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "dtype": "float32",
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "intermediate_size": 2 * HIDDEN,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "max_position_embeddings": CONTEXT,
                "hidden_act": "silu",
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "tie_word_embeddings": False,
                "eos_token_id": 1,
                "pad_token_id": 0,
            }
        )
    )
    _write_tokenizer(folder)
    save_file(random_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    head = HIDDEN // HEADS

    def normal(*shape: int) -> np.ndarray:
        return (0.2 * random.standard_normal(shape)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": normal(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(heads * head, HIDDEN)
            weights[f"{prefix}self_attn.{name}_proj.bias"] = normal(heads * head)
        weights[f"{prefix}self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * head)
        weights[f"{prefix}mlp.gate_proj.weight"] = normal(2 * HIDDEN, HIDDEN)
        weights[f"{prefix}mlp.up_proj.weight"] = normal(2 * HIDDEN, HIDDEN)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(HIDDEN, 2 * HIDDEN)
        weights[f"{prefix}input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
        weights[f"{prefix}post_attention_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    return weights


def write_version(
    base: Path,
    store: Path,
    version: int,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    spoil: Callable[[Path], None] | None = None,
) -> WeightsEntry:
    """Write `v<version>` beside the others and return its event. `spoil` damages the folder behind the manifest's back."""
    folder = store / f"v{version:06d}"
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = dict(weights if weights is not None else random_weights(version))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = msgspec.json.encode(manifest_of(folder, version))
    (folder / "manifest.json").write_bytes(manifest)
    entry = WeightsEntry(
        version=version,
        step=version,
        uri=str(folder),
        manifest_sha256=hashlib.sha256(manifest).hexdigest(),
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        dtype="F32",
        parent=version - 1,
    )
    if spoil is not None:
        spoil(folder)
    return entry


def manifest_of(folder: Path, version: int) -> Manifest:
    files = {
        path.name: FileInfo(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
    }
    tensors = {
        name: TensorInfo(file="model.safetensors", shape=array.shape, dtype="F32")
        for name, array in load_file(folder / "model.safetensors").items()
    }
    return Manifest(version=version, step=version, files=files, tensors=tensors)


def tear(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


async def publish(broker: Broker, base: Path, store: Path, version: int) -> None:
    await broker.weights.publish("main", write_version(base, store, version))

"""The base model: the same seed gives the same weights, and both environments read the same tokenizer from it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lachesis.envs.arithmetic.base_model import EOS, VOCAB, ensure_base_model

pytestmark = pytest.mark.slow

INFERENCE = Path(__file__).parents[2] / ".venv-sglang" / "bin" / "python"
TEXTS = ["max 37 52=", "rev 482=", "hi", "", "  two  spaces ", "don't\n\tß €", "<eos>"]
ENCODE = """
import json, sys
sys.modules["torch"] = None  # spares seconds; tokenizers need none
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
encoded = [tokenizer.encode(text) for text in json.loads(sys.argv[2])]
print(json.dumps({
    "encoded": encoded,
    "decoded": [tokenizer.decode(ids) for ids in encoded],
    "eos": tokenizer.eos_token_id,
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
}))
"""


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_seed_decides_the_weights(model_folder: Path, tmp_path: Path) -> None:
    assert weights_hash(ensure_base_model(tmp_path / "same", 0, steps=20)) == weights_hash(model_folder)
    assert weights_hash(ensure_base_model(tmp_path / "other", 1, steps=4)) != weights_hash(model_folder)


def test_the_number_of_threads_does_not(model_folder: Path, tmp_path: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert weights_hash(ensure_base_model(tmp_path / "threads", 0, steps=20)) == weights_hash(model_folder)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_it_is_made_once_however_many_ask(tmp_path: Path) -> None:
    progress: list[str] = []
    folders: list[Path] = []

    def ask() -> None:
        folders.append(ensure_base_model(tmp_path / "model", 0, progress.append, steps=1))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "model"] * 3
    assert len(progress) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_what_an_interrupted_run_left_behind_is_not_taken_for_a_model(tmp_path: Path) -> None:
    left = tmp_path / ".tmp-model"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    folder = ensure_base_model(tmp_path / "model", 0, steps=1)
    assert (folder / "config.json").is_file()
    assert not left.exists()


def test_its_configuration_covers_its_vocabulary(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    generation = json.loads((model_folder / "generation_config.json").read_text())
    assert config["vocab_size"] == VOCAB
    assert config["eos_token_id"] == generation["eos_token_id"] == EOS
    assert config["architectures"] == ["Qwen2ForCausalLM"]


def tokenized(python: Path, folder: Path) -> dict[str, object]:
    command = [str(python), "-c", ENCODE, str(folder), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def here(model_folder: Path) -> dict[str, object]:
    return tokenized(Path(sys.executable), model_folder)


def test_the_tokenizer_loses_no_character(here: dict[str, object]) -> None:
    assert here["decoded"] == TEXTS
    assert here["eos"] == EOS
    assert here["chat"] == "hi"
    encoded = here["encoded"]
    assert isinstance(encoded, list)
    assert [len(ids) for ids in encoded[:3]] == [len(text) for text in TEXTS[:3]]  # one token a byte
    assert all(0 <= token < VOCAB for ids in encoded for token in ids)


@pytest.mark.skipif(not INFERENCE.exists(), reason="needs the inference environment in .venv-sglang")
def test_the_tokenizer_is_the_same_in_the_inference_environment(here: dict[str, object], model_folder: Path) -> None:
    assert tokenized(INFERENCE, model_folder) == here

"""Published versions: complete, described by their manifest, loadable by others, and collected only when unused."""

from __future__ import annotations

import hashlib
import random
import resource
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_kit import make_tiny_model, scored_group, stored

from lachesis.broker import LeaseLost, StorageError, WeightsRefused
from lachesis.broker.records.versions import Manifest, WeightsEntry
from lachesis.broker.weights.manifest import read_manifest
from lachesis.trainer.data.collate import to_batch
from lachesis.trainer.weights import versions
from lachesis.trainer.weights.versions import VersionStore

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.engine.verl_engine import Engine


def tensors(value: float = 1.0) -> list[tuple[str, Tensor]]:
    return [("a.weight", torch.full((3, 2), value)), ("b.weight", torch.arange(4.0)), ("c.weight", torch.ones(2))]


def write(store: VersionStore, version: int, tensors: Iterable[tuple[str, Tensor]]) -> WeightsEntry:
    return store.write(version, version, version - 1, store.copy(version, tensors))


@pytest.fixture
def store(tmp_path: Path, tiny_model: Path) -> VersionStore:
    return VersionStore(tmp_path / "weights", tiny_model, dtype="bf16")


def test_a_version_holds_what_its_manifest_says(store: VersionStore, tiny_model: Path) -> None:
    entry = write(store, 7, tensors())
    folder = Path(entry.uri)
    assert folder == store.path(7)
    raw = (folder / "manifest.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == entry.manifest_sha256
    manifest = msgspec.json.decode(raw, type=Manifest)
    assert (manifest.version, manifest.step, entry.parent, entry.dtype) == (7, 7, 6, "BF16")
    assert manifest.files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= manifest.files.keys()
    for name, info in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (info.bytes, info.sha256)
    assert (folder / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    found = load_file(folder / "model.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in manifest.tensors.items()} == {
        name: ("BF16", tuple(tensor.shape)) for name, tensor in found.items()
    }
    assert all(found[name].equal(tensor.bfloat16()) for name, tensor in tensors())


def test_what_agents_would_refuse_stays_behind(tmp_path: Path, tiny_model: Path) -> None:
    """Files of the base model's folder that are neither configuration nor tokenizer."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "modeling.py",
        "pytorch_model.bin",
        "manifest.json",
        "a b.json",
    ):
        (base / name).write_text("x")
    folder = Path(write(VersionStore(tmp_path / "weights", base, dtype="bf16"), 1, tensors()).uri)
    manifest = read_manifest((folder / "manifest.json").read_bytes())
    assert manifest.files.keys() == {path.name for path in tiny_model.iterdir() if path.name != "manifest.json"}


def test_large_models_are_written_in_shards(store: VersionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "SHARD_BYTES", 12)
    folder = Path(write(store, 1, tensors()).uri)
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
    index = msgspec.json.decode((folder / "model.safetensors.index.json").read_bytes())
    assert len({info.file for info in manifest.tensors.values()}) == 2
    assert index["weight_map"] == {name: info.file for name, info in manifest.tensors.items()}
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_values_that_are_not_finite_are_never_published(store: VersionStore, value: float) -> None:
    broken = torch.tensor([1.0, value], dtype=torch.float64)
    with pytest.raises(WeightsRefused, match=r"version 3 .* b\.weight"):
        write(store, 3, [("a.weight", torch.ones(1)), ("b.weight", broken)])
    assert store.versions() == []
    assert [path.name for path in store.folder.iterdir()] == [".shared"]


def test_a_copy_does_not_follow_the_weights(store: VersionStore, tmp_path: Path, tiny_model: Path) -> None:
    for kept in (store, VersionStore(tmp_path / "fp32", tiny_model, dtype="fp32")):  # narrowed, or as they are
        weight = torch.ones(2, 3)
        copied = kept.copy(1, [("a.weight", weight), ("a.transposed", weight.T)])
        weight.zero_()
        assert all(tensor.eq(1).all() and tensor.is_contiguous() for _, tensor in copied)


def test_a_full_disk_is_told_in_one_line_and_left_without_halves(store: VersionStore) -> None:
    weights = [("a.weight", torch.ones(1 << 16))]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limit[1]))  # as if there was no more room
    try:
        with pytest.raises(StorageError, match=f"version 4 can't be written to {store.folder}: ") as refusal:
            write(store, 4, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in store.folder.iterdir()] == [".shared"]
    write(store, 4, weights)


def test_a_version_that_was_never_announced_is_replaced(store: VersionStore) -> None:
    write(store, 1, tensors(1.0))
    second = write(store, 1, tensors(2.0))
    assert load_file(Path(second.uri) / "model.safetensors")["a.weight"].max() == 2


def test_the_newest_and_those_in_use_survive_collection(store: VersionStore) -> None:
    for version in range(6):
        write(store, version, tensors())
    assert store.collect(keep=2, in_use={1, -1}) == [0, 2, 3]
    assert store.versions() == [1, 4, 5]


def test_what_a_crash_left_half_done_is_cleared(store: VersionStore, tiny_model: Path) -> None:
    write(store, 1, tensors())
    (store.folder / ".tmp-v2").mkdir()
    (store.folder / ".old-v0").mkdir()
    again = VersionStore(store.folder, tiny_model, dtype="bf16")
    assert sorted(path.name for path in again.folder.iterdir()) == [".shared", "v000001"]
    assert (again.path(1) / "config.json").is_file()


@pytest.mark.verl
def test_adapters_are_published_as_a_whole_model(
    built: Callable[..., tuple[Engine, DictConfig]], tmp_path: Path, tiny_model: Path
) -> None:
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.engine.export import published_tensors

    engine, config = built("actor_rollout_ref.model.lora_rank=2")
    Learner(engine, config.algorithm).step(
        to_batch([stored(scored_group(random.Random(0)))], vocab_size=320, max_tokens=64)
    )
    published = write(VersionStore(tmp_path, tiny_model, dtype="fp32"), 1, published_tensors(engine))
    after, before = load_file(Path(published.uri) / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert after.keys() == before.keys()
    moved = [name for name in after if not torch.allclose(after[name], before[name], atol=1e-2)]
    assert moved
    assert all("proj" in name for name in moved)


@pytest.mark.verl
@pytest.mark.parametrize("tied", [False, True])
def test_an_engines_weights_load_in_hugging_face(
    built: Callable[..., tuple[Engine, DictConfig]], tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lachesis.trainer.engine.export import published_tensors

    model = make_tiny_model(tmp_path / "model", tied=tied)
    engine, _ = built(model=model)
    store = VersionStore(tmp_path / "weights", model, dtype="fp32")
    folder = Path(write(store, 0, published_tensors(engine)).uri)
    original, published = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, folder))
    assert original.keys() == published.keys()
    assert all(original[name].equal(published[name]) for name in original)
    assert AutoTokenizer.from_pretrained(folder)("hi").input_ids == AutoTokenizer.from_pretrained(model)("hi").input_ids
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied


@pytest.mark.parametrize("progress", ["begun", "written"])
def test_one_that_was_stopped_while_it_wrote_leaves_its_successor_alone(
    store: VersionStore, tiny_model: Path, progress: str
) -> None:
    """It wakes when another has cleared up and has begun, or written, the same version."""
    found: list[WeightsEntry] = []

    def take_over() -> VersionStore:
        return VersionStore(store.folder, tiny_model, dtype="bf16")

    def check() -> None:
        if not found:
            found.append(write(take_over(), 1, tensors(2.0)))
        raise LeaseLost("another replica publishes now")

    def stopped_in_the_middle() -> Iterable[tuple[str, Tensor]]:
        if progress == "begun":
            successor = take_over()
            assert not list(store.folder.glob(".tmp-*"))  # cleared
            found.append(write(successor, 1, tensors(2.0)))
        yield from tensors(1.0)

    with pytest.raises(LeaseLost):
        store.write(1, 1, 0, stopped_in_the_middle(), check)
    raw = (store.path(1) / "manifest.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == found[0].manifest_sha256
    assert load_file(store.path(1) / "model.safetensors")["a.weight"].unique().tolist() == [2.0]
    assert store.versions() == [1]
    assert not list(store.folder.glob(".tmp-*"))


def test_two_writers_of_a_version_have_a_folder_each(store: VersionStore, tiny_model: Path) -> None:
    names: list[str] = []

    def look() -> None:
        names.extend(path.name for path in store.folder.glob(".tmp-*"))

    store.write(1, 1, 0, store.copy(1, tensors()), look)
    other = VersionStore(store.folder, tiny_model, dtype="bf16")
    other.write(1, 1, 0, other.copy(1, tensors()), look)
    assert len(set(names)) == 2

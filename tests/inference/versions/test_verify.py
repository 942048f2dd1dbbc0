"""A version is loaded only if it is exactly what was published, fits the served model and is finite."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import VOCAB, make_model, random_weights, write_version
from safetensors.numpy import save_file

from lachesis.broker import ConfigurationError, WeightsRefused
from lachesis.inference.versions.model_folder import ModelFolder, is_hub_name, read_model_folder
from lachesis.inference.versions.safetensors_reader import CHUNK, read_header, read_through
from lachesis.inference.versions.verify import VersionGone, verify


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def served(base: Path) -> ModelFolder:
    return read_model_folder(base)


def test_a_good_version_is_accepted(base: Path, served: ModelFolder, tmp_path: Path) -> None:
    entry = write_version(base, tmp_path, 3)

    assert verify(entry, served) == tmp_path / "v000003"
    assert verify(msgspec.structs.replace(entry, uri=f"file://{entry.uri}"), None) == tmp_path / "v000003"


def flip_a_byte(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def tear(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def swap_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["step"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest))


def add_stray_weights(folder: Path) -> None:
    save_file({"model.norm.weight": np.zeros(64, np.float32)}, folder / "stray.safetensors")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (tear, "model.safetensors has"),
        (flip_a_byte, "SHA-256 of model.safetensors"),
        (swap_manifest, "SHA-256 differs from the event's"),
        (add_stray_weights, "'stray.safetensors' is not in the manifest"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_what_was_damaged_after_publishing_is_refused(
    base: Path, served: ModelFolder, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    entry = write_version(base, tmp_path, 3, spoil=spoil)

    with pytest.raises(WeightsRefused, match=f"version 3 refused: .*{reason}"):
        verify(entry, served)


def test_what_was_published_wrong_is_refused(base: Path, served: ModelFolder, tmp_path: Path) -> None:
    """Consistent with their own manifest, but SGLang would take the first and the last, and die of the second."""
    weights = random_weights(1)
    norm = weights["model.norm.weight"]
    without = {name: array for name, array in weights.items() if name != "model.norm.weight"}
    broken = np.where(np.arange(64) == 63, np.float32("nan"), norm)

    for version, tensors, reason in (
        (1, without, "model.norm.weight is missing, the served model has it"),
        (2, without | {"model.norm.weight": norm[:32]}, "shape"),
        (3, weights | {"model.extra.weight": norm}, "model.extra.weight is unknown to the served model"),
        (4, without | {"model.norm.weight": broken}, "model.norm.weight in model.safetensors holds values"),
    ):
        with pytest.raises(WeightsRefused, match=reason):
            verify(write_version(base, tmp_path, version, weights=tensors), served)


def test_a_tied_output_layer_may_be_stored_or_not(base: Path, served: ModelFolder, tmp_path: Path) -> None:
    without = {name: array for name, array in random_weights(1).items() if name != "lm_head.weight"}
    entry = write_version(base, tmp_path, 1, weights=without)

    with pytest.raises(WeightsRefused, match=r"lm_head\.weight is missing"):
        verify(entry, served)
    assert verify(entry, msgspec.structs.replace(served, tied=True))


def test_a_collected_version_is_gone_rather_than_refused(base: Path, served: ModelFolder, tmp_path: Path) -> None:
    entry = write_version(base, tmp_path, 1, spoil=shutil.rmtree)

    with pytest.raises(VersionGone):
        verify(entry, served)


def test_a_store_that_is_no_folder_is_refused(base: Path, tmp_path: Path) -> None:
    entry = msgspec.structs.replace(write_version(base, tmp_path, 1), uri="s3://bucket/v1")

    with pytest.raises(WeightsRefused, match="neither a path nor a file"):
        verify(entry, None)


def write_raw(path: Path, dtype: str, values: bytes, count: int) -> Path:
    header = json.dumps({"t": {"dtype": dtype, "shape": [count], "data_offsets": [0, len(values)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)
    return path


@given(bits=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40))
def test_bfloat16_is_judged_by_its_exponent(tmp_path_factory: pytest.TempPathFactory, bits: list[int]) -> None:
    """A bfloat16 is the upper half of a float32, so numpy can say what is finite."""
    halves = np.array(bits, dtype="<u2")
    as_float32 = (halves.astype("<u4") << 16).view("<f4")
    path = write_raw(tmp_path_factory.mktemp("bf16") / "t.safetensors", "BF16", halves.tobytes(), len(bits))

    assert (read_through(path)[1] is None) == bool(np.isfinite(as_float32).all())


@given(kind=st.sampled_from([("F16", "<f2"), ("F32", "<f4"), ("F64", "<f8")]), raw=st.binary(min_size=8, max_size=64))
def test_finite_means_what_numpy_says(
    tmp_path_factory: pytest.TempPathFactory, kind: tuple[str, str], raw: bytes
) -> None:
    raw = raw[: len(raw) // 8 * 8]
    values = np.frombuffer(raw, dtype=kind[1])
    path = write_raw(tmp_path_factory.mktemp("float") / "t.safetensors", kind[0], raw, len(values))

    assert (read_through(path)[1] is None) == bool(np.isfinite(values).all())


@pytest.mark.parametrize("bad", [0, CHUNK // 4 - 1, CHUNK // 4, CHUNK // 2 + 2, None])
def test_one_reading_hashes_all_and_judges_each_value(tmp_path: Path, bad: int | None) -> None:
    """Two tensors, of several chunks and in an order that is not their names'; what is not finite is in the first."""
    values = np.ones(CHUNK // 2 + 3, "<f4")
    if bad is not None:
        values[bad] = -np.inf
    raw, last = values.tobytes(), np.full(5, 0xFF, np.uint8).tobytes()
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [5], "data_offsets": [len(raw), len(raw) + 5]},
            "z": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(raw)]},
        }
    ).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw + last)

    assert read_through(path) == (hashlib.sha256(path.read_bytes()).hexdigest(), None if bad is None else "z")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "t.safetensors"
    path.write_bytes(raw)

    try:
        tensors, start = read_header(path)
    except WeightsRefused:
        return
    assert start + sum(t.data_offsets[1] - t.data_offsets[0] for t in tensors.values()) == len(raw)


def test_a_model_folder_tells_what_the_server_needs(served: ModelFolder) -> None:
    assert (served.vocab_size, served.context_length, served.dtype, served.tied) == (VOCAB, 512, "float32", False)
    assert served.shapes["lm_head.weight"] == (VOCAB, 64)


@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
    ],
)
def test_an_incomplete_model_folder_is_named(base: Path, tmp_path: Path, remove: str, reason: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / remove).unlink()

    with pytest.raises(ConfigurationError, match=reason):
        read_model_folder(folder)


def test_a_hub_name_is_told_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)

    assert is_hub_name("Qwen/Qwen2.5-0.5B-Instruct")
    assert not any(map(is_hub_name, ("models/mine", "./models/later", ".lachesis/tiny", "a/b/c", "/abs/olute", "tiny")))

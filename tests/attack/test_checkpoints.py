"""Who may write to the folder of checkpoints runs no code in a trainer, and gives it no weights that it did not save."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking
from lachesis.broker.errors import CheckpointRefused
from lachesis.trainer.weights.checkpoint import Checkpoints
from lachesis.trainer.weights.checkpoint_files import CHECKPOINT_MANIFEST

sys.path.append(str(Path(__file__).parents[1] / "trainer"))
from trainer_kit import PATIENCE_S, context, make_tiny_model, preload

SHARD = "model_world_size_1_rank_0.pt"


class Worker:
    """Its checkpoint is two files; it remembers what it loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save_checkpoint(self, folder: str, _: object, step: int, __: object) -> None:
        (Path(folder) / SHARD).write_bytes(b"weights after step %d" % step)
        (Path(folder) / "huggingface").mkdir()
        (Path(folder) / "huggingface" / "config.json").write_text("{}")

    def load_checkpoint(self, folder: str, *_: object) -> None:
        self.loaded.append((Path(folder) / SHARD).read_text())


@pytest.fixture
def blocking(shared_redis: EmbeddedRedis, run_name: str) -> Iterator[BlockingBroker]:
    with connect_blocking(shared_redis.url, run_name) as broker:
        yield broker


def flip(folder: Path) -> None:
    raw = bytearray((folder / SHARD).read_bytes())
    raw[3] ^= 1
    (folder / SHARD).write_bytes(raw)


def link(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "elsewhere")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def add(folder: Path) -> None:
    (folder / "model_world_size_2_rank_0.pt").write_bytes(b"of a trainer with two ranks")


def rewrite(folder: Path) -> None:
    manifest = (folder / CHECKPOINT_MANIFEST).read_text()
    (folder / CHECKPOINT_MANIFEST).write_text(manifest.replace('"step": 2', '"step": 1'))


def replace(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-1", folder)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (flip, f"{SHARD}' has SHA-256"),
    "cut off": (lambda folder: os.truncate(folder / SHARD, 5), f"{SHARD}' has 5 bytes: it was saved with 20"),
    "a file missing": (lambda folder: (folder / "huggingface/config.json").unlink(), "config.json' is missing"),
    "a link": (link, f"{SHARD}' is no regular file"),
    "a pipe": (pipe, f"{SHARD}' is no regular file"),
    "one more file": (add, "model_world_size_2_rank_0.pt' is not in the checkpoint's manifest"),
    "another manifest": (rewrite, f"{CHECKPOINT_MANIFEST}' is not known to Redis"),
    "no manifest of ours": (
        lambda folder: (folder / CHECKPOINT_MANIFEST).write_text('{"step": 2}\n'),
        f"{CHECKPOINT_MANIFEST}' is not known to Redis",
    ),
    "an endless manifest": (
        lambda folder: os.truncate(folder / CHECKPOINT_MANIFEST, 1 << 40),
        f"{CHECKPOINT_MANIFEST}' is not known to Redis",
    ),
    "of another step": (
        replace,
        f"{CHECKPOINT_MANIFEST}' is not known to Redis",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_checkpoint_is_not_loaded_and_the_one_before_it_is(
    tmp_path: Path, blocking: BlockingBroker, how: str
) -> None:
    spoil, said = SPOILED[how]
    worker = Worker()
    checkpoints = Checkpoints(tmp_path, worker, blocking, "main")
    checkpoints.save(1)
    checkpoints.save(2)
    spoil(tmp_path / "step-2")

    again = Checkpoints(tmp_path, worker, blocking, "main")
    with pytest.raises(CheckpointRefused) as error:
        again.load(2)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert worker.loaded == []
    assert again.steps() == [1]
    again.load(1)
    again.save(2)  # it does not count as saved
    again.load(2)
    assert worker.loaded == ["weights after step 1", "weights after step 2"]


def test_planted_checkpoints_count_as_nothing(tmp_path: Path, blocking: BlockingBroker) -> None:
    """Or a trainer would take a step for saved, and have its groups freed."""
    worker = Worker()
    checkpoints = Checkpoints(tmp_path, worker, blocking, "main")
    for step in (1, 4):
        checkpoints.save(step)
    for step in (2, 3, 5):
        shutil.copytree(tmp_path / "step-1", tmp_path / f"step-{step}")
    (tmp_path / "step-7").symlink_to(tmp_path / "step-4")
    assert checkpoints.steps() == [1, 4]
    checkpoints.save(5)
    checkpoints.load(5)
    assert worker.loaded == ["weights after step 5"]
    assert checkpoints.steps() == [4, 5]
    assert not (tmp_path / "step-3").exists()


def test_what_an_older_version_saved_is_loaded_where_that_is_said(tmp_path: Path, blocking: BlockingBroker) -> None:
    worker = Worker()
    (tmp_path / "step-3").mkdir()
    worker.save_checkpoint(str(tmp_path / "step-3"), None, 3, None)
    (tmp_path / "step-3" / CHECKPOINT_MANIFEST).write_text('{"step": 3}\n')
    with pytest.raises(CheckpointRefused, match=r"load it once with lachesis.unverified_checkpoints=true"):
        Checkpoints(tmp_path, worker, blocking, "main").load(3)
    told = Checkpoints(tmp_path, worker, blocking, "main", unverified=True)
    told.load(3)
    assert worker.loaded == ["weights after step 3"]
    told.save(4)
    flip(tmp_path / "step-4")
    with pytest.raises(CheckpointRefused, match=f"{SHARD}' has SHA-256"):  # Redis knows this one
        told.load(4)


class Pickled:
    """What unpickling it does: it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.made}",)


def load_pickles(model: Path, folder: Path, said: Path) -> None:
    """Save a checkpoint with verl, and load it with a pickle in the place of each of its files. Runs in a process."""
    os.environ["VERL_PLATFORM"] = "cpu"
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.algo.rank_group import RankGroup
    from lachesis.trainer.config.compose import compose_config
    from lachesis.trainer.engine.verl_engine import build_engine

    config = compose_config([f"actor_rollout_ref.model.path={model}"], device="cpu")
    engine = build_engine(config)
    rank_group = RankGroup(engine, Learner(engine, config.algorithm))
    rank_group.save_checkpoint(str(folder), None, 1, None)
    lines = []
    for file in sorted(folder.glob("*.pt")):
        whole = file.read_bytes()
        for spoiled in (pickle.dumps(Pickled(said), protocol=2), zipped(Pickled(said)), b"", b"no checkpoint"):
            file.write_bytes(spoiled)
            try:
                rank_group.load_checkpoint(str(folder), None, False)
            except CheckpointRefused as error:
                lines.append(str(error))
        file.write_bytes(whole)
    rank_group.load_checkpoint(str(folder), None, False)
    assert not said.exists(), "a pickle ran"
    said.write_text("\n".join(lines))


def zipped(value: object) -> bytes:
    """As torch.save writes it."""
    import torch

    torch.save(value, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.verl
def test_a_pickle_in_the_place_of_a_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where somebody has told the trainer to load what Redis does not know, and torch to load anything."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")  # verl looks once, when it is imported
    preload()
    said = tmp_path / "said"
    process = context.Process(target=load_pickles, args=(make_tiny_model(tmp_path / "model"), tmp_path / "saved", said))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    lines = said.read_text().splitlines()
    assert len(lines) == 3 * 4
    assert all("can't be loaded: only tensors and plain values are" in line for line in lines)
    assert sum("Trying to load unsupported GLOBAL posix.system" in line for line in lines) >= 3

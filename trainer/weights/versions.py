"""Published weights on disk: one folder a version, Hugging Face's layout, complete or absent.

A version is written aside as `.tmp-<writer>-v<version>`, synced, and renamed to `v<version>` (six digits); `manifest.json`
lists every file and tensor. One who writes where another writes by now, because it was stopped meanwhile, finds its own
folder gone, or has it alone; it never touches the other's. Configuration and tokenizer never change, so versions share them by hard links.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lachesis.broker.errors import LeaseLost, StorageError, WeightsRefused
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.versions import FileInfo, Manifest, TensorInfo, WeightsEntry
from lachesis.broker.weights.manifest import MANIFEST, may_be_published
from lachesis.trainer.weights.fsync import fsync, rename_durably

DTYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16"), "fp16": (torch.float16, "F16")}
SHARD_BYTES = 4 << 30
WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?")


class VersionStore:
    """The versions of one policy in one folder."""

    def __init__(self, folder: Path, model_dir: Path, *, dtype: str) -> None:
        self.folder = folder
        self._dtype, self._dtype_name = DTYPES[dtype]
        for left in (*folder.glob(".tmp-*"), *folder.glob(".old-*"), folder / ".shared"):
            shutil.rmtree(left, ignore_errors=True)
        self._writer = uuid4().hex[:12]
        self._shared = folder / ".shared"
        self._shared.mkdir(parents=True)
        self._host: dict[str, Tensor] = {}
        self._shared_files: dict[str, FileInfo] = {}
        for path in sorted(model_dir.iterdir()):
            if path.is_file() and may_be_published(path.name) and not WEIGHTS.fullmatch(path.name):
                self._shared_files[path.name] = _settle(Path(shutil.copy(path, self._shared)))

    def path(self, version: int) -> Path:
        return self.folder / f"v{version:06d}"

    def versions(self) -> list[int]:
        """Versions on disk, oldest first."""
        names = (re.fullmatch(r"v(\d{6,})", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def copy(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The tensors in host memory, in the published dtype, apart from those that training goes on to change.

        The memory is that of the copy before, which has to be written by now: new pages cost as much as copying.
        Raises WeightsRefused for a value that is not finite in that dtype.
        """
        copied = []
        for name, tensor in tensors:
            tensor = tensor.detach()
            # rounding keeps order, and a NaN is its own extreme: this is isfinite of every value, ten times as fast
            extremes = torch.stack(torch.aminmax(tensor)).to(self._dtype) if tensor.numel() else tensor
            if not torch.isfinite(extremes).all():
                raise WeightsRefused(
                    f"version {version} is not published: {name} holds values that are not finite as {self._dtype_name}. "
                    "Lower actor_rollout_ref.actor.optim.lr and go on from an earlier checkpoint"
                )
            host = self._host.get(name)
            if host is None or host.shape != tensor.shape:
                host = self._host[name] = torch.empty(tensor.shape, dtype=self._dtype)
            copied.append((name, host.copy_(tensor)))
        return copied

    def write(
        self,
        version: int,
        step: int,
        parent: int,
        copied: Iterable[tuple[str, Tensor]],
        check: Callable[[], None] = lambda: None,
    ) -> WeightsEntry:
        """Write a version and return the event that announces it; one that is there already is replaced.

        `check` raises if another process has the right to write by now; it is asked before anything is replaced.
        Raises StorageError if it can't be written. Nothing is left behind then, nor when `check` raises.
        """
        temporary = self.folder / f".tmp-{self._writer}-v{version}"
        try:
            return self._write(temporary, version, step, parent, copied, check)
        except LeaseLost:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            check()  # the one who took over cleared it away
            raise StorageError(f"version {version} can't be written to {self.folder}: {error}") from error

    def _write(
        self,
        temporary: Path,
        version: int,
        step: int,
        parent: int,
        copied: Iterable[tuple[str, Tensor]],
        check: Callable[[], None],
    ) -> WeightsEntry:
        temporary.mkdir()
        files, infos = self._write_shards(temporary, copied)
        for name in self._shared_files:
            try:
                os.link(self._shared / name, temporary / name)
            except OSError:  # a filesystem without hard links
                _settle(Path(shutil.copy(self._shared / name, temporary / name)))
        files |= self._shared_files
        manifest = msgspec.json.encode(Manifest(version=version, step=step, files=files, tensors=infos))
        (temporary / MANIFEST).write_bytes(manifest)
        fsync(temporary / MANIFEST)
        fsync(temporary)
        failpoint("publish", version)
        check()
        self.remove(version)
        rename_durably(temporary, self.path(version))
        return WeightsEntry(
            version=version,
            step=step,
            uri=str(self.path(version)),
            manifest_sha256=hashlib.sha256(manifest).hexdigest(),
            bytes=sum(info.bytes for info in files.values()),
            dtype=self._dtype_name,
            parent=parent,
        )

    def remove(self, version: int) -> None:
        """Delete a version, if it is there; a crash in between leaves no half of it under its name."""
        if self.path(version).exists():
            aside = self.folder / f".old-v{version}"
            self.path(version).rename(aside)
            shutil.rmtree(aside)

    def collect(self, *, keep: int, in_use: set[int]) -> list[int]:
        """Delete all but the newest `keep` versions and those in use. Returns what was deleted."""
        collected = [version for version in self.versions()[:-keep] if version not in in_use]
        for version in collected:
            self.remove(version)
        return collected

    def _write_shards(
        self, folder: Path, tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[dict[str, FileInfo], dict[str, TensorInfo]]:
        files: dict[str, FileInfo] = {}
        infos: dict[str, TensorInfo] = {}
        shard: dict[str, Tensor] = {}

        def flush(name: str) -> None:
            save_file(shard, folder / name, metadata={"format": "pt"})
            files[name] = _settle(folder / name)
            infos.update(
                {key: TensorInfo(file=name, shape=tuple(t.shape), dtype=self._dtype_name) for key, t in shard.items()}
            )
            shard.clear()

        size = 0
        for key, tensor in tensors:
            if shard and size + tensor.nbytes > SHARD_BYTES:
                flush(f"model-{len(files) + 1:05d}.safetensors")
                size = 0
            shard[key] = tensor
            size += tensor.nbytes
        if not files:
            flush("model.safetensors")
            return files, infos
        flush(f"model-{len(files) + 1:05d}.safetensors")
        total = sum(info.bytes for info in files.values())
        index = {"metadata": {"total_size": total}, "weight_map": {key: info.file for key, info in infos.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        files["model.safetensors.index.json"] = _settle(folder / "model.safetensors.index.json")
        return files, infos


def _settle(path: Path) -> FileInfo:
    """Sync a finished file and say what it holds."""
    fsync(path)
    with path.open("rb") as file:
        return FileInfo(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())

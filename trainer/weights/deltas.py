"""What is sent of a version: its files, or how they differ from those of the version before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from msgspec import structs

from lachesis.broker.records.groups import Base, Manifest, WeightsEntry
from lachesis.broker.weights.delta import write_delta
from lachesis.broker.weights.manifest import MANIFEST

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of an element


class Deltas:
    """Every `full_every`-th version is sent whole, and the first, and what would not become smaller."""

    def __init__(self, full_every: int) -> None:
        self._full_every = full_every
        self._last: tuple[WeightsEntry, Path] | None = None  # as it was sent, and where its files lie here
        self._since_full = 0  # versions sent as deltas since a whole one

    @contextmanager
    def packed(self, entry: WeightsEntry, folder: Path) -> Iterator[tuple[WeightsEntry, dict[str, Path]]]:
        """The version's event, and where the files to be sent lie by their names there, the manifest last."""
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        files = {name: folder / name for name in (*manifest.files, MANIFEST)}
        if self._last is None or not self._last[1].exists() or self._since_full + 1 >= self._full_every:
            yield entry, files
            return
        base, beneath = self._last
        with TemporaryDirectory(prefix=".tmp-delta-", dir=folder.parent) as aside:
            deltas = {}
            for name in sorted({tensor.file for tensor in manifest.tensors.values()}):
                packed = Path(aside, f"{name}.delta")
                told = write_delta(beneath / name, folder / name, packed, width=WIDTHS[entry.dtype])
                if told is not None:
                    deltas[name] = told
                    files = {packed.name: packed} | {other: at for other, at in files.items() if other != name}
            if deltas:
                sent = structs.replace(manifest, base=Base(base.version, base.uri, base.manifest_sha256, deltas))
                raw = msgspec.json.encode(sent)
                files[MANIFEST] = Path(aside, MANIFEST)
                files[MANIFEST].write_bytes(raw)
                entry = structs.replace(entry, manifest_sha256=hashlib.sha256(raw).hexdigest())
            yield entry, files

    def sent(self, entry: WeightsEntry, folder: Path, *, whole: bool) -> None:
        """The next one may build on this one; `entry` says where it lies."""
        self._last, self._since_full = (entry, folder), 0 if whole else self._since_full + 1

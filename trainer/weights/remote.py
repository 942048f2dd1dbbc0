"""Versions at a URL: any place that fsspec can write to, where agents fetch them from.

A version goes to `v<version>-<beginning of its manifest's SHA-256>/`, its manifest last. The name tells which contents
belong there, so an upload that was cut short goes on with what is missing, also when the version had to be trained again
and came out the same; if it came out otherwise, it has another name.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import fsspec
import msgspec
from msgspec import structs
from structlog.stdlib import BoundLogger

from lachesis.broker.errors import ConfigurationError, StorageError
from lachesis.broker.failpoints import failpoint
from lachesis.broker.records.versions import Base, Manifest, WeightsEntry
from lachesis.broker.weights.delta import write_delta
from lachesis.broker.weights.manifest import MANIFEST

STORE_RETRY_S = 600.0  # with a store that does not answer
FIRST_DELAY_S, LAST_DELAY_S = 0.5, 10.0  # between two tries; it doubles
HASH_DIGITS = 12

T = TypeVar("T")


class RemoteVersions:
    """The versions of one policy at a URL; all but every `full_every`-th as the difference to the one before."""

    def __init__(self, url: str, log: BoundLogger, full_every: int = 1) -> None:
        self.url, self._log = url.rstrip("/"), log
        self._shown = re.sub("//[^/@]*@", "//", self.url)  # without a password
        _check(self.url)
        self._opened: tuple[Any, str] | None = None
        self._deltas = Deltas(full_every)
        self._bases: dict[str, str | None] = {}  # the version's name that a version's deltas are to
        self._rest: Callable[[float], bool] = threading.Event().wait
        self._go_on: Callable[[], None] = lambda: None

    def bind(self, *, rest: Callable[[float], bool], go_on: Callable[[], None]) -> None:
        """Between two tries: `rest` waits for so many seconds, and is true if there is no time for another; `go_on`
        raises what ends the work, such as LeaseLost.
        """
        self._rest, self._go_on = rest, go_on

    def make(self) -> None:
        """Raise StorageError now if nothing can be written there."""
        try:
            self._makedirs("")
        except Exception as error:  # every backend has kinds of its own
            raise StorageError(f"lachesis.weights_dir: {self._shown} can't be written to: {_text(error)}") from error

    def upload(self, entry: WeightsEntry, folder: Path) -> WeightsEntry:
        """Copy a version that lies in `folder`; returns its event with the URL.

        Raises StorageError after STORE_RETRY_S, and at once where the folder's own disk fails.
        """
        try:
            return self._upload(entry, folder)
        except StorageError:
            raise
        except OSError as error:
            self._go_on()  # one who took over may have cleared files away
            raise StorageError(f"version {entry.version} can't be sent from {folder}: {error}") from error

    def _upload(self, entry: WeightsEntry, folder: Path) -> WeightsEntry:
        with self._deltas.packed(entry, folder) as (sent, files):
            name = f"v{sent.version:06d}-{sent.manifest_sha256[:HASH_DIGITS]}"
            self._try(partial(self._makedirs, name))
            for file, source in files.items():
                size, target = source.stat().st_size, f"{name}/{file}"
                if self._try(partial(self._size, target)) != size:
                    self._try(partial(self._put, source, target, size))
                failpoint("uploaded", entry.version)
        sent = structs.replace(sent, uri=f"{self.url}/{name}")
        self._deltas.sent(sent, folder, whole=sent.manifest_sha256 == entry.manifest_sha256)
        return sent

    def collect(self, newest: int, wanted: Callable[[int], str | None]) -> None:
        """Delete what lies there of versions up to `newest`, but for the URLs that are `wanted` and what those build on."""
        names = set(self._try(self._names))
        kept = {name for name in names if _version(name) > newest or wanted(_version(name)) == f"{self.url}/{name}"}
        for name in list(kept):
            base = self._try(partial(self._base, name))
            while base is not None and base not in kept:
                kept.add(base)
                base = self._try(partial(self._base, base))
        for name in sorted(names - kept, reverse=True):  # what builds on others first
            self._try(partial(self._remove, name))
            self._bases.pop(name, None)

    def versions(self) -> list[int]:
        """Versions of which something lies there, oldest first."""
        return sorted({_version(name) for name in self._try(self._names)})

    # -- one try --------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> tuple[Any, str]:
        """The file system, and where `name` lies in it."""
        if self._opened is None:
            self._opened = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
        fs, root = self._opened
        fs.invalidate_cache()
        return fs, f"{root.rstrip('/')}/{name}".rstrip("/")

    def _makedirs(self, name: str) -> None:
        fs, folder = self._place(name)
        fs.makedirs(folder, exist_ok=True)

    def _size(self, name: str) -> int:
        """-1 if it is not there."""
        fs, path = self._place(name)
        try:
            return int(fs.info(path)["size"])
        except FileNotFoundError:
            return -1

    def _put(self, source: Path, target: str, size: int) -> None:
        fs, path = self._place(target)
        fs.put_file(str(source), path)
        if (found := self._size(target)) != size:
            raise OSError(f"{target} has {found} bytes after {size} were written")

    def _names(self) -> list[str]:
        fs, root = self._place("")
        names = (path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False))
        return [name for name in names if re.fullmatch(rf"v\d{{6,}}-[0-9a-f]{{{HASH_DIGITS}}}", name)]

    def _base(self, name: str) -> str | None:
        """What a version's deltas are to; None for a whole one, and for one whose manifest is not there yet, or in part."""
        if name not in self._bases:
            fs, manifest = self._place(f"{name}/{MANIFEST}")
            try:
                base = msgspec.json.decode(fs.cat_file(manifest), type=Manifest).base
            except (FileNotFoundError, msgspec.DecodeError):
                return None
            self._bases[name] = base.uri.rpartition("/")[2] if base else None
        return self._bases[name]

    def _remove(self, name: str) -> None:
        """The manifest first: what has none is no version."""
        if self._size(f"{name}/{MANIFEST}") >= 0:
            fs, manifest = self._place(f"{name}/{MANIFEST}")
            fs.rm_file(manifest)
        fs, folder = self._place(name)
        fs.rm(folder, recursive=True)

    def _try(self, operation: Callable[[], T]) -> T:
        """Its result, once the store answers."""
        delay, waited = FIRST_DELAY_S, 0.0
        while True:
            try:
                return operation()
            except Exception as error:  # every backend has kinds of its own for a store that does not answer
                self._opened = None  # its connection may be broken for good
                self._go_on()
                if waited >= STORE_RETRY_S or self._rest(delay):
                    raise StorageError(f"{self._shown} can't be written to: {_text(error)}") from error
                self._log.warning(
                    "the weights store does not answer, trying again", url=self._shown, error=_text(error)
                )
            waited, delay = waited + delay, min(2 * delay, LAST_DELAY_S)


def _version(name: str) -> int:
    return int(name[1 : name.index("-")])


def _check(url: str) -> None:
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"lachesis.weights_dir = {url!r}: can't be written from here: {error}") from None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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

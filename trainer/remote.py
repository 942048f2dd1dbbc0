"""Versions at a URL: any place that fsspec can write to, where agents fetch them from.

A version goes to `v<version>-<beginning of its manifest's SHA-256>/`, its manifest last. The name tells which contents
belong there, so an upload that was cut short goes on with what is missing, also when the version had to be trained again
and came out the same; if it came out otherwise, it has another name.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import msgspec
from msgspec import structs
from structlog.stdlib import BoundLogger

from lachesis.broker.crash import crash_point
from lachesis.broker.errors import ConfigurationError, StorageError
from lachesis.broker.records import Manifest, WeightsEntry
from lachesis.trainer.versions import MANIFEST

PATIENCE_S = 600.0  # with a store that does not answer
FIRST_DELAY_S, LAST_DELAY_S = 0.5, 10.0  # between two tries; it doubles
HASH_DIGITS = 12

T = TypeVar("T")


class RemoteVersions:
    """The versions of one policy at a URL."""

    def __init__(self, url: str, log: BoundLogger) -> None:
        self.url, self._log = url.rstrip("/"), log
        self._shown = re.sub("//[^/@]*@", "//", self.url)  # without a password
        _check(self.url)
        self._opened: tuple[Any, str] | None = None
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
        """Copy a version that lies in `folder`; returns its event with the URL. Raises StorageError after PATIENCE_S."""
        name = f"v{entry.version:06d}-{entry.manifest_sha256[:HASH_DIGITS]}"
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        self._try(partial(self._makedirs, name))
        for file in (*manifest.files, MANIFEST):
            size = (folder / file).stat().st_size
            target = f"{name}/{file}"
            if self._try(partial(self._size, target)) != size:
                self._try(partial(self._put, folder / file, target, size))
            crash_point("uploaded", entry.version)
        return structs.replace(entry, uri=f"{self.url}/{name}")

    def collect(self, newest: int, wanted: Callable[[int], str | None]) -> None:
        """Delete what lies there of versions up to `newest`, but for the URLs that are `wanted` of them."""
        for name in self._try(self._names):
            version = int(name[1 : name.index("-")])
            if version <= newest and wanted(version) != f"{self.url}/{name}":
                self._try(partial(self._remove, name))

    def versions(self) -> list[int]:
        """Versions of which something lies there, oldest first."""
        return sorted({int(name[1 : name.index("-")]) for name in self._try(self._names)})

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
                if waited >= PATIENCE_S or self._rest(delay):
                    raise StorageError(f"{self._shown} can't be written to: {_text(error)}") from error
                self._log.warning(
                    "the weights store does not answer, trying again", url=self._shown, error=_text(error)
                )
            waited, delay = waited + delay, min(2 * delay, LAST_DELAY_S)


def _check(url: str) -> None:
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"lachesis.weights_dir = {url!r}: can't be written from here: {error}") from None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

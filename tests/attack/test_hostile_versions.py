"""Whatever a published version says, or its store sends: it is refused with a reason, and the one before it serves on.

All of it through a whole agent, whose SGLang is tests/attack/fake_sglang.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import fake_sglang
import msgspec
import pytest
import roles
from aiohttp import web
from published import make_model, write_version

from lachesis.broker import Broker
from lachesis.broker.records.versions import ServerStatus, WeightsEntry
from lachesis.broker.weights.manifest import MANIFEST, MAX_MANIFEST
from lachesis.inference.versions import safetensors_reader

pytestmark = pytest.mark.anyio

SHA = hashlib.sha256
WEIGHTS = "model.safetensors"
DEEP = b"[" * 100_000 + b"]" * 100_000


class Store:
    """A folder of versions, behind HTTP too, where the file that `endless` beside it names never ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, make_model(folder / "base")
        self.url, self.written = "", 0
        self.sent = 0  # bytes of what never ends

    async def get(self, request: web.Request) -> web.StreamResponse:
        path = self.folder / request.match_info["path"]
        if not path.is_file():
            raise web.HTTPNotFound
        endless = path.with_name("endless")
        if endless.exists() and endless.read_text() == path.name:
            response = web.StreamResponse()
            await response.prepare(request)
            while request.method == "GET":
                await response.write(b"x" * (1 << 20))
                self.sent += 1 << 20
            return response
        return web.FileResponse(path)

    def write(self, **how: Any) -> WeightsEntry:
        self.written += 1
        return write_version(self.base, self.folder, self.written, **how)

    def remote(self, entry: WeightsEntry) -> WeightsEntry:
        return msgspec.structs.replace(entry, uri=f"{self.url}/v{entry.version:06d}")

    def edited(self, change: Callable[[Path, dict[str, Any]], bytes | None]) -> WeightsEntry:
        """A version whose manifest is honest, after `change` has done what it likes to the folder and to it."""
        entry = self.write()
        folder = Path(entry.uri)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        raw = change(folder, manifest)
        raw = json.dumps(manifest).encode() if raw is None else raw
        (folder / MANIFEST).write_bytes(raw)
        return msgspec.structs.replace(entry, manifest_sha256=SHA(raw).hexdigest())


def replaces(name: str, content: bytes) -> Callable[[Path, dict[str, Any]], None]:
    """A file with other contents, which the manifest lists truthfully."""

    def change(folder: Path, manifest: dict[str, Any]) -> None:
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": SHA(content).hexdigest()}

    return change


def names(name: str) -> Callable[[Path, dict[str, Any]], None]:
    """A further file of that name in the manifest, and where the name allows it, in the folder."""

    def change(folder: Path, manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"bytes": 4, "sha256": SHA(b"EVIL").hexdigest()}
        try:
            if os.sep not in name and name:
                (folder / name).write_bytes(b"EVIL")
        except (OSError, ValueError):
            pass

    return change


def says(**changed: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, manifest: dict[str, Any]) -> None:
        manifest.update(changed)

    return change


def config(**changed: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, manifest: dict[str, Any]) -> None:
        found = json.loads((folder / "config.json").read_bytes()) | changed
        replaces("config.json", json.dumps(found).encode())(folder, manifest)

    return change


def weights(header: Any, data: bytes = b"", length: int | None = None) -> Callable[[Path, dict[str, Any]], None]:
    """A safetensors file of this header, whose tensors the manifest lists as the header has them."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(raw) if length is None else length) + raw + data

    def change(folder: Path, manifest: dict[str, Any]) -> None:
        replaces(WEIGHTS, content)(folder, manifest)
        told = header if isinstance(header, dict) else {}
        manifest["tensors"] = {
            name: {"file": WEIGHTS, "shape": info["shape"], "dtype": info["dtype"]} for name, info in told.items()
        }

    return change


def tensor(dtype: str, shape: list[int], size: int) -> Callable[[Path, dict[str, Any]], None]:
    return weights({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, b"\0" * size)


def raw(content: bytes) -> Callable[[Path, dict[str, Any]], bytes]:
    return lambda folder, manifest: content


def pipe(folder: Path, manifest: dict[str, Any]) -> None:
    replaces("vocab.json", b"")(folder, manifest)
    (folder / "vocab.json").unlink()
    os.mkfifo(folder / "vocab.json")


def unlisted(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, manifest: dict[str, Any]) -> None:
        (folder / name).write_bytes(b"EVIL")

    return change


BASE = {"version": 1, "uri": "/nowhere", "manifest_sha256": "0" * 64}
DELTA = {
    "width": 0,
    "base_sha256": "0" * 64,
    "file": {"bytes": 1, "sha256": "0" * 64},
    "whole": {"bytes": 1, "sha256": "0" * 64},
}
LOCAL: dict[str, Callable[[Path, dict[str, Any]], bytes | None]] = {
    "vocab_size is text": config(vocab_size="abc"),
    "vocab_size is a list": config(vocab_size=[1]),
    "vocab_size is negative": config(vocab_size=-1),
    "vocab_size is huge": config(vocab_size=10**400),
    "vocab_size is a fraction": config(vocab_size=1.5),
    "max_position_embeddings is an object": config(max_position_embeddings={}),
    "text_config is a list": config(text_config=[1]),
    "text_config is text": config(text_config="x"),
    "config is a list": replaces("config.json", b"[]"),
    "config is deep": replaces("config.json", b'{"a":' + DEEP + b"}"),
    "config is not UTF-8": replaces("config.json", b'{"\xff":1}'),
    "config is empty": replaces("config.json", b""),
    "header is deep": weights(b'{"a":' + DEEP + b"}"),
    "header is not UTF-8": weights(b'{"\xff":{}}'),
    "header is not UTF-8 within": weights(b'{"a":{"dtype":"\xff","shape":[],"data_offsets":[0,0]}}'),
    "header is longer than its file": weights(b"{}", length=2**63),
    "header is a list": weights(b"[]"),
    "shape is negative": tensor("F32", [-1, -1], 4),
    "shape is huge": tensor("F32", [2**62, 4], 4),
    "shape has many sides": tensor("F32", [2**40] * 4000, 4),
    "size of I64 is wrong": tensor("I64", [2**40], 8),
    "type is unknown": tensor("X9", [1], 4),
    "offsets are negative": weights({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "offsets are text": weights({"a": {"dtype": "F32", "shape": [1], "data_offsets": "x"}}),
    "manifest is deep": raw(b'{"version":1,"step":1,"files":' + DEEP + b"}"),
    "manifest is not UTF-8": raw(b"\xff\xfe"),
    "manifest has a huge number": raw(b'{"version":1,"step":1,"files":{"a.json":{"bytes":' + b"9" * 5000 + b"}}}"),
    "manifest is empty": raw(b""),
    "manifest is a list": raw(b"[]"),
    "manifest is of another version": says(version=77),
    "files is a list": says(files=[]),
    "bytes are negative": says(files={"config.json": {"bytes": -1, "sha256": "0" * 64}}),
    "hash is text": says(files={"config.json": {"bytes": 1, "sha256": "../../x"}}),
    "a delta that is not listed": says(base=BASE | {"deltas": {"x.safetensors": DELTA}}),
    "a delta of elements of no bytes": says(base=BASE | {"deltas": {WEIGHTS: DELTA}}),
    "a pipe": pipe,
    "a pickle that is not listed": unlisted("pytorch_model.bin"),
    "code that is not listed": unlisted("modeling.py"),
    **{
        f"a file named {name[:20]!r}": names(name)
        for name in (
            "", ".", "..", "../x.json", "/tmp/x.json", "a/b.json", "a\0b.json", "a\nb.json", "a" * 300 + ".json", ".hidden.json",
            ".part-model.safetensors", "manifest.json", "..\\x.json", "a b.json", "é.json", "\ud800.json", "x.json?y#z", "pytorch_model.bin",
            "modeling.py", "x.pt", "x.delta", "json",
        )
    },
}  # fmt: skip


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path / "store")
    app = web.Application()
    app.router.add_get("/{path:.*}", store.get)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    store.url = "http://{}:{}".format(*runner.addresses[0][:2])
    yield store
    await runner.cleanup()


class Served:
    """A whole agent with its server, as a pool sees them."""

    def __init__(self, broker: Broker, running: asyncio.Task[None], folder: Path) -> None:
        self._broker, self._running, self.folder = broker, running, folder
        self.server = 0

    async def until(self, what: Callable[[ServerStatus], bool]) -> ServerStatus:
        found = None
        try:
            with anyio.fail_after(120):
                while True:
                    if self._running.done():
                        self._running.result()
                    for found in await self._broker.registry.servers():
                        if what(found):
                            return found
                    await anyio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"the last status was {found}") from None

    async def serves(self, version: int) -> None:
        await self.until(lambda status: (status.version, status.state) == (version, "ready"))

    async def refuses(self, entry: WeightsEntry, serving: int) -> str:
        """The reason; the version that was served is served on, by the same process."""
        await self._broker.weights.publish("main", entry)
        status = await self.until(lambda status: f"version {entry.version} refused: " in status.last_error)
        assert (status.version, status.state) == (serving, "ready")
        assert roles.below(os.getpid()).count(self.server) == 1
        assert len(status.last_error) <= 1000
        return status.last_error


@pytest.fixture
async def agent(broker: Broker, store: Store, tmp_path: Path) -> AsyncIterator[Served]:
    """It serves version 1."""
    before = set(roles.below(os.getpid()))
    async with fake_sglang.agent(broker, tmp_path / "state", "s") as running:
        served = Served(broker, running, tmp_path / "state")
        await broker.weights.publish("main", store.write())
        await served.serves(1)
        [served.server] = set(roles.below(os.getpid())) - before
        yield served


async def test_every_hostile_version_is_refused(broker: Broker, store: Store, agent: Served) -> None:
    for name, change in LOCAL.items():
        assert await agent.refuses(store.edited(change), 1), name
    await broker.weights.publish("main", good := store.write())
    await agent.serves(good.version)


async def test_so_is_what_comes_from_a_url(broker: Broker, store: Store, agent: Served) -> None:
    for name, change in LOCAL.items():
        if not name.startswith(
            ("manifest", "files", "bytes", "hash", "a delta", "a file named", "vocab_size is text", "header is deep")
        ):
            continue  # it is read from the copy, as from any folder
        assert await agent.refuses(store.remote(store.edited(change)), 1), name
    await broker.weights.publish("main", good := store.remote(store.write()))
    await agent.serves(good.version)
    staged = {path.name for path in (agent.folder / "runs" / broker.keys.run / "staged" / "main").iterdir()}
    assert staged <= {f"v{version:06d}" for version in range(store.written + 1)}


async def test_so_is_an_address_that_is_none(broker: Broker, store: Store, agent: Served) -> None:
    odd = store.write()
    for uri in ("carrier-pigeon://x", "http://[", "file://elsewhere/x", "/a\0b", "file:///a%00b"):
        store.written += 1
        await agent.refuses(msgspec.structs.replace(odd, version=store.written, uri=uri), 1)
    await broker.weights.publish("main", good := store.write())
    await agent.serves(good.version)


async def test_no_byte_more_than_was_announced_is_written(broker: Broker, store: Store, agent: Served) -> None:
    entry = store.remote(store.write())
    served = store.folder / f"v{entry.version:06d}"
    (served / "endless").write_text(WEIGHTS)
    assert "model.safetensors has more than" in await agent.refuses(entry, 1)
    left = sum(path.stat().st_size for path in (agent.folder / "runs").rglob("*") if path.is_file())
    assert left < 4 << 20
    assert store.sent < 256 << 20
    entry = store.remote(store.write())
    (store.folder / f"v{entry.version:06d}" / "endless").write_text(MANIFEST)
    assert "manifest.json is not the one" in await agent.refuses(entry, 1)
    assert store.sent < 2 * MAX_MANIFEST + (256 << 20)


async def test_what_the_disk_has_no_room_for_is_not_begun(broker: Broker, store: Store, agent: Served) -> None:
    def enormous(folder: Path, manifest: dict[str, Any]) -> None:
        manifest["files"][WEIGHTS]["bytes"] = 1 << 60

    await broker.weights.publish("main", store.remote(store.edited(enormous)))
    status = await agent.until(lambda status: "bytes are missing" in status.last_error)
    assert (status.version, status.state) == (1, "ready")
    await broker.weights.publish("main", good := store.remote(store.write()))
    await agent.serves(good.version)


def test_every_type_of_the_format_has_its_size() -> None:
    from safetensors import numpy as formats

    assert {name for name in formats._TYPES if not name.startswith("F8")} <= safetensors_reader._BITS.keys()

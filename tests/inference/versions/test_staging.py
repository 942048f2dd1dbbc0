"""Versions behind a URL come to this machine whole, once, and not again after a kill; a real HTTP server is the store."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import pytest
from aiohttp import web
from published import make_model, random_weights, write_version
from test_watcher import LOG, NAN, heartbeat_of

from lachesis.broker import Broker, WeightsRefused
from lachesis.broker.records.versions import Base, Manifest, WeightsEntry
from lachesis.broker.weights.delta import write_delta
from lachesis.broker.weights.manifest import MANIFEST
from lachesis.inference.versions.download import Abandoned
from lachesis.inference.versions.model_folder import read_model_folder
from lachesis.inference.versions.staging import Staging
from lachesis.inference.versions.verification_cache import VerificationCache
from lachesis.inference.versions.verify import VersionGone, verify
from lachesis.inference.versions.watcher import VersionWatcher

pytestmark = pytest.mark.anyio
WEIGHTS = "model.safetensors"


class Store:
    """A folder of versions behind HTTP; `asked` counts GETs by path, `held` keeps an answer back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_model(folder / "base")
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.held: tuple[str, int] | None = None  # (file, bytes of it that are given out)
        self.url = ""

    async def get(self, request: web.Request) -> web.StreamResponse:
        path = self.folder / request.match_info["path"]
        if not path.is_file():
            raise web.HTTPNotFound
        if request.method == "GET":
            self.asked[request.match_info["path"]] += 1
            if "Range" in request.headers and path.name == WEIGHTS:
                self.ranges.append(request.headers["Range"])
            if self.held is not None and path.name == self.held[0]:
                end = request.http_range.stop
                if end is None or end > self.held[1]:
                    await anyio.sleep_forever()
        return web.FileResponse(path)

    def publish(self, version: int, **how: object) -> WeightsEntry:
        entry = write_version(self.base, self.folder, version, **how)  # type: ignore[arg-type]
        return msgspec.structs.replace(entry, uri=f"{self.url}/v{version:06d}")


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


async def fetch(staging: Staging, entry: WeightsEntry) -> Path:
    return await anyio.to_thread.run_sync(staging.fetch, entry, threading.Event())


async def test_a_version_is_fetched_once_and_is_what_was_published(store: Store, tmp_path: Path) -> None:
    entry, staging = store.publish(3), Staging(tmp_path / "staged", keep=2)

    folder = await fetch(staging, entry)
    asked = store.asked.copy()

    assert folder == tmp_path / "staged" / "v000003"
    verify(msgspec.structs.replace(entry, uri=str(folder)), read_model_folder(store.base))
    assert {path.name for path in folder.iterdir()} == {path.name for path in (store.folder / "v000003").iterdir()}
    assert await fetch(staging, entry) == folder
    assert await fetch(Staging(tmp_path / "staged", keep=2), entry) == folder  # another agent of this machine
    assert store.asked == asked


FETCH = """
import sys, threading, msgspec
from pathlib import Path
from lachesis.broker.records.versions import WeightsEntry
from lachesis.inference.versions.staging import Staging
Staging(Path(sys.argv[1]), keep=2).fetch(msgspec.json.decode(sys.argv[2], type=WeightsEntry), threading.Event())
"""


def fetching(entry: WeightsEntry, folder: Path) -> subprocess.Popen[bytes]:
    """Another process that fetches it."""
    return subprocess.Popen([sys.executable, "-c", FETCH, str(folder / "staged"), msgspec.json.encode(entry)])


async def test_after_a_kill_it_goes_on_where_it_was(store: Store, tmp_path: Path) -> None:  # fmt: skip
    weights = {name: array.repeat(40, axis=0) for name, array in random_weights(1).items()}  # several pieces long
    entry = store.publish(3, weights=weights)
    size = (store.folder / "v000003" / WEIGHTS).stat().st_size
    assert size > 2 * (8 << 20)
    store.held = (WEIGHTS, size - 100)
    part = tmp_path / "staged" / "v000003" / f".part-{WEIGHTS}"
    killed = fetching(entry, tmp_path)
    with anyio.fail_after(60):
        while not part.exists() or part.stat().st_size < 8 << 20:  # noqa: ASYNC110
            await anyio.sleep(0.05)
    killed.kill()
    await anyio.to_thread.run_sync(killed.wait)
    fetched = part.stat().st_size
    complete = {f"v000003/{path.name}" for path in part.parent.iterdir() if not path.name.startswith(".")}
    store.held = None
    store.asked.clear()
    store.ranges.clear()

    folder = await fetch(Staging(tmp_path / "staged", keep=2), entry)

    verify(msgspec.structs.replace(entry, uri=str(folder)), None)
    assert min(int(asked.removeprefix("bytes=").split("-")[0]) for asked in store.ranges) >= fetched > 0
    assert not complete & store.asked.keys()


async def test_a_beginning_of_another_file_is_fetched_anew(store: Store, tmp_path: Path) -> None:
    entry = store.publish(3)
    (tmp_path / "staged" / "v000003").mkdir(parents=True)
    (tmp_path / "staged" / "v000003" / f".part-{WEIGHTS}").write_bytes(b"x" * 1000)

    folder = await fetch(Staging(tmp_path / "staged", keep=2), entry)

    verify(msgspec.structs.replace(entry, uri=str(folder)), None)


async def test_what_a_killed_try_left_does_not_spoil_the_next(store: Store, tmp_path: Path) -> None:
    entry = store.publish(3)
    (tmp_path / "staged" / "v000003").mkdir(parents=True)
    for name in (f"{WEIGHTS}.delta", ".part-config.json", "other.safetensors"):
        (tmp_path / "staged" / "v000003" / name).write_bytes(b"x")

    folder = await fetch(Staging(tmp_path / "staged", keep=2), entry)

    verify(msgspec.structs.replace(entry, uri=str(folder)), None)


async def test_agents_of_one_machine_fetch_together(store: Store, tmp_path: Path) -> None:
    entry = store.publish(3)
    agents = [Staging(tmp_path / "staged", keep=2) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(agent.fetch, entry, threading.Event()) for agent in agents]
        while not all(job.done() for job in jobs):  # noqa: ASYNC110
            await anyio.sleep(0.02)
        assert {job.result() for job in jobs} == {tmp_path / "staged" / "v000003"}

    assert store.asked["v000003/config.json"] == 1


async def test_the_last_ones_are_kept_and_those_in_use(store: Store, tmp_path: Path) -> None:
    ours, others = (Staging(tmp_path / "staged", keep=2) for _ in range(2))
    await fetch(others, store.publish(1))
    for version in (2, 3, 4):
        await fetch(ours, store.publish(version))
    assert {path.name for path in (tmp_path / "staged").iterdir()} == {"v000001", "v000003", "v000004"}
    await fetch(others, msgspec.structs.replace(store.publish(5)))
    assert {path.name for path in (tmp_path / "staged").iterdir()} == {"v000004", "v000005"}


async def test_what_is_not_there_yet_can_be_there_later(store: Store, tmp_path: Path) -> None:
    entry, staging = store.publish(3), Staging(tmp_path / "staged", keep=2)
    (store.folder / "v000003").rename(store.folder / "later")
    with pytest.raises(VersionGone, match=r"version 3: http.* does not exist"):
        await fetch(staging, entry)
    (store.folder / "later").rename(store.folder / "v000003")
    await fetch(staging, entry)

    nobody = msgspec.structs.replace(entry, version=4, uri="http://127.0.0.1:1/v4")
    with pytest.raises(VersionGone, match=r"http://127.0.0.1:1/v4 can't be read now: ClientConnectorError"):
        await fetch(staging, nobody)


def _swap_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _flip(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_swap_manifest, "manifest.json is not the one that was published"),
        (_drop_config, "config.json is missing"),
        (_flip, "the SHA-256 of model.safetensors differs"),
        (_cut, r"model.safetensors has \d+ bytes, the manifest says"),
    ],
)
async def test_what_is_not_what_was_published_is_refused(store: Store, tmp_path: Path, spoil: object, says: str) -> None:  # fmt: skip
    entry, staging = store.publish(3, spoil=spoil), Staging(tmp_path / "staged", keep=2)
    with pytest.raises(WeightsRefused, match=f"version 3 refused: {says}"):
        await fetch(staging, entry)
    assert not (tmp_path / "staged" / "v000003" / MANIFEST).exists()


async def test_a_url_of_a_kind_unknown_here_is_refused(store: Store, tmp_path: Path) -> None:
    entry = msgspec.structs.replace(store.publish(3), uri="carrier-pigeon://coop/v3")
    with pytest.raises(WeightsRefused, match="carrier-pigeon://coop/v3' can't be read here: Protocol not known"):
        await fetch(Staging(tmp_path / "staged", keep=2), entry)


async def test_who_waits_for_another_agent_can_be_stopped(store: Store, tmp_path: Path) -> None:
    entry, stop = store.publish(3), threading.Event()
    store.held = (WEIGHTS, 100)
    killed = fetching(entry, tmp_path)
    with anyio.fail_after(60):
        while not (tmp_path / "staged" / "v000003" / f".part-{WEIGHTS}").exists():  # noqa: ASYNC110
            await anyio.sleep(0.05)
    stop.set()
    with pytest.raises(Abandoned):
        await anyio.to_thread.run_sync(Staging(tmp_path / "staged", keep=2).fetch, entry, stop)
    killed.kill()
    killed.wait()


async def test_a_server_is_fed_from_a_url(broker: Broker, store: Store, tmp_path: Path) -> None:
    """As from a folder: the newest good one, staged, verified, and named while it is on its way."""
    heartbeat = heartbeat_of(broker)
    watcher = VersionWatcher(
        broker,
        "main",
        store.base,
        Staging(tmp_path / "staged", keep=2),
        VerificationCache(tmp_path / "verified"),
        heartbeat,
        LOG,
    )
    await broker.weights.publish("main", store.publish(1))
    await broker.weights.publish("main", store.publish(2, weights=random_weights(1) | NAN))

    found = await watcher.first()

    assert (found.version, found.model.folder) == (1, tmp_path / "staged" / "v000001")
    assert found.passed_over.startswith("version 2 refused: model.norm.weight")
    assert [status.loading for status in await broker.registry.servers()] == [1]
    manifest = (found.model.folder / MANIFEST).read_bytes()
    assert hashlib.sha256(manifest).hexdigest() == store_hash(store, 1)


def store_hash(store: Store, version: int) -> str:
    return hashlib.sha256((store.folder / f"v{version:06d}" / MANIFEST).read_bytes()).hexdigest()


def as_delta(store: Store, entry: WeightsEntry, base: WeightsEntry) -> WeightsEntry:
    """The version with its weights replaced by their difference to the base's."""
    folder, beneath = (store.folder / f"v{one.version:06d}" for one in (entry, base))
    told = write_delta(beneath / WEIGHTS, folder / WEIGHTS, folder / f"{WEIGHTS}.delta", width=4)
    assert told is not None
    (folder / WEIGHTS).unlink()
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    of = Base(version=base.version, uri=base.uri, manifest_sha256=base.manifest_sha256, deltas={WEIGHTS: told})
    raw = msgspec.json.encode(msgspec.structs.replace(manifest, base=of))
    (folder / MANIFEST).write_bytes(raw)
    return msgspec.structs.replace(entry, manifest_sha256=hashlib.sha256(raw).hexdigest())


def chain(store: Store) -> tuple[list[WeightsEntry], bytes]:
    """(version 1, whole, and 2 and 3 as deltas, each to the one before; the weights of 3)."""
    one, two, three = (store.publish(version) for version in (1, 2, 3))
    weights = (store.folder / "v000003" / WEIGHTS).read_bytes()
    three = as_delta(store, three, two)
    # the base of 3 is 2 as it is announced, so its manifest has to be the one of the delta
    two = as_delta(store, two, one)
    manifest = msgspec.json.decode((store.folder / "v000003" / MANIFEST).read_bytes(), type=Manifest)
    assert manifest.base is not None
    base = msgspec.structs.replace(manifest.base, manifest_sha256=two.manifest_sha256)
    raw = msgspec.json.encode(msgspec.structs.replace(manifest, base=base))
    (store.folder / "v000003" / MANIFEST).write_bytes(raw)
    return [one, two, msgspec.structs.replace(three, manifest_sha256=hashlib.sha256(raw).hexdigest())], weights


async def test_a_joiner_walks_back_to_the_whole_base_and_a_follower_fetches_the_delta_alone(
    store: Store, tmp_path: Path
) -> None:
    entries, weights = chain(store)
    joiner = await fetch(Staging(tmp_path / "joiner", keep=3), entries[2])
    assert (joiner / WEIGHTS).read_bytes() == weights
    verify(msgspec.structs.replace(entries[2], uri=str(joiner)), read_model_folder(store.base))
    assert not list(joiner.glob("*.delta"))

    follower = Staging(tmp_path / "follower", keep=3)
    await fetch(follower, entries[0])
    await fetch(follower, entries[1])
    store.asked.clear()
    assert (await fetch(follower, entries[2]) / WEIGHTS).read_bytes() == weights
    assert {path.split("/")[0] for path in store.asked} == {"v000003"}


async def test_a_delta_without_its_base_or_spoiled_is_not_staged(store: Store, tmp_path: Path) -> None:
    entries, _ = chain(store)
    packed = store.folder / "v000003" / f"{WEIGHTS}.delta"
    raw = packed.read_bytes()
    packed.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(WeightsRefused, match=r"version 3 refused: the SHA-256 of model\.safetensors\.delta differs"):
        await fetch(Staging(tmp_path / "spoiled", keep=3), entries[2])
    packed.write_bytes(raw)
    (store.folder / "v000001" / MANIFEST).unlink()
    with pytest.raises(VersionGone, match=r"version 1: .* does not exist"):
        await fetch(Staging(tmp_path / "gone", keep=3), entries[2])

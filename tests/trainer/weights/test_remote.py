"""Versions published to a URL: a real FTP server is the store, agents' staging reads what the trainer wrote there."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from trainer_kit import fill, preload, until
from verl_run import STEPS, Run

from lachesis.broker import (
    BlockingBroker,
    ConfigurationError,
    EmbeddedRedis,
    LeaseLost,
    StorageError,
    WeightsRefused,
)
from lachesis.broker.records.versions import Manifest, ServerStatus, WeightsEntry
from lachesis.inference.versions.staging import Staging
from lachesis.inference.versions.verify import VersionGone, verify
from lachesis.service.logs import configure_logging
from lachesis.trainer.weights.publisher import Publisher
from lachesis.trainer.weights.remote import RemoteVersions
from lachesis.trainer.weights.versions import VersionStore

LOG = configure_logging("trainer")
WEIGHTS = "model.safetensors"


class FtpServer:
    """A process that serves a folder; `kill` and `start` as often as one likes, on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"ftp://user:pw@127.0.0.1:{self.port}/weights"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = ["-i", "127.0.0.1", "-p", str(self.port), "-d", str(self.folder), "-w", "-u", "user", "-P", "pw"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pyftpdlib", *where], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self._answers)

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                return connection.recv(3) == b"220"
        except OSError:
            return False

    def folders(self, place: str = "weights") -> list[str]:
        return sorted(path.name for path in (self.folder / place).iterdir())


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[FtpServer]:
    (tmp_path / "ftp").mkdir()
    server = FtpServer(tmp_path / "ftp")
    server.start()
    yield server
    server.kill()


class WriteAccess:
    """To write the policy, until it is taken away."""

    lost = False

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("another trainer took over")


@pytest.fixture
def right() -> WriteAccess:
    return WriteAccess()


@pytest.fixture
def publisher(
    ftp: FtpServer, blocking: BlockingBroker, right: WriteAccess, tmp_path: Path, tiny_model: Path
) -> Iterator[Publisher]:
    remote = RemoteVersions(ftp.url, LOG)
    remote.make()
    store = VersionStore(tmp_path / "local", tiny_model, dtype="fp32")
    with Publisher(blocking, "main", store, right, keep_versions=2, remote=remote) as made:
        yield made


def publish(publisher: Publisher, version: int) -> None:
    publisher.publish(version, version - 1, [("a.weight", torch.full((1000,), float(version)))])


def entries(blocking: BlockingBroker) -> dict[int, WeightsEntry]:
    found = {}
    for version in range(1, 20):
        if (entry := blocking.call(blocking.broker.weights.get, "main", version)) is not None:
            found[version] = entry
    return found


def staged(entry: WeightsEntry, folder: Path) -> Path:
    """As an agent has it: fetched over the same URL, each file checked against the manifest, and then verified."""
    copy = Staging(folder, keep=9).fetch(entry, threading.Event())
    return verify(msgspec.structs.replace(entry, uri=str(copy)), None)


def test_agents_fetch_what_was_published_and_the_last_ones_and_those_in_use_are_kept(
    publisher: Publisher, ftp: FtpServer, blocking: BlockingBroker, tmp_path: Path
) -> None:
    serving = ServerStatus("s", "main", "http://s", "ready", 2, -1, 0.0)
    for version in range(1, 6):
        blocking.call(blocking.broker.registry.report, msgspec.structs.replace(serving, heartbeat=2e9))
        publish(publisher, version)
        publisher.flush()
    published = entries(blocking)
    assert list(published) == [1, 2, 3, 4, 5]
    assert ftp.folders() == [published[version].uri.rpartition("/")[2] for version in (2, 4, 5)]
    for version in (2, 4, 5):
        weights = load_file(staged(published[version], tmp_path / "staged") / WEIGHTS)
        assert weights["a.weight"].tolist() == [float(version)] * 1000
    assert [path.name for path in (tmp_path / "local").glob("v*")] == ["v000005"]


def test_a_store_that_comes_back_is_waited_for(
    publisher: Publisher, ftp: FtpServer, blocking: BlockingBroker, tmp_path: Path
) -> None:
    publish(publisher, 1)
    publisher.flush()
    ftp.kill()
    publish(publisher, 2)
    publisher.check()  # training goes on
    assert list(entries(blocking)) == [1]
    with pytest.raises(VersionGone, match=r"version 1: ftp://.* can't be read now: "):  # an agent tries again, too
        staged(entries(blocking)[1], tmp_path / "staged")
    ftp.start()
    publisher.flush()
    assert list(entries(blocking)) == [1, 2]
    staged(entries(blocking)[1], tmp_path / "staged")


def test_a_store_that_is_away_at_the_end_is_said_and_nothing_is_announced(
    publisher: Publisher, ftp: FtpServer, blocking: BlockingBroker
) -> None:
    ftp.kill()
    publish(publisher, 1)
    with pytest.raises(StorageError, match=r"^ftp://127.0.0.1:\d+/weights can't be written to: "):
        publisher.flush(hurry=True)
    assert entries(blocking) == {}
    ftp.start()


def test_who_lost_the_policy_does_not_wait_for_the_store(
    publisher: Publisher, ftp: FtpServer, right: WriteAccess
) -> None:
    publish(publisher, 1)
    publisher.flush()
    ftp.kill()
    publish(publisher, 2)
    right.lost = True
    with pytest.raises(LeaseLost):
        publisher.flush()
    ftp.start()


def test_what_a_cut_upload_left_is_completed_and_what_nobody_announced_goes(
    publisher: Publisher, ftp: FtpServer, blocking: BlockingBroker, tmp_path: Path
) -> None:
    publish(publisher, 1)
    publisher.flush()
    (name,) = ftp.folders()
    other = ftp.folder / "weights" / f"{name[:7]}-{'0' * 12}"  # the same version, as another trainer made it
    shutil.copytree(ftp.folder / "weights" / name, other)
    publish(publisher, 2)
    publisher.flush()
    assert ftp.folders() == [entry.uri.rpartition("/")[2] for entry in entries(blocking).values()]

    entry = entries(blocking)[2]
    torn = ftp.folder / "weights" / entry.uri.rpartition("/")[2]
    (torn / "manifest.json").unlink()
    (torn / WEIGHTS).write_bytes((torn / WEIGHTS).read_bytes()[:100])
    whole = {path.name: path.stat().st_mtime_ns for path in torn.iterdir() if path.name != WEIGHTS}
    again = RemoteVersions(ftp.url, LOG)
    assert again.upload(msgspec.structs.replace(entry, uri="local"), tmp_path / "local" / "v000002") == entry
    assert {name: (torn / name).stat().st_mtime_ns for name in whole} == whole  # not sent again
    staged(entry, tmp_path / "staged")


def test_a_manifest_that_a_kill_tore_stops_nobody_and_takes_no_other_versions_place(
    publisher: Publisher, ftp: FtpServer, blocking: BlockingBroker
) -> None:
    publish(publisher, 1)
    publisher.flush()
    torn = ftp.folder / "weights" / f"v000003-{'0' * 12}"  # of a version later than the checkpoint that is gone on from
    torn.mkdir()
    (torn / "manifest.json").write_bytes(b'{"version":3,')
    publish(publisher, 2)
    publisher.flush()
    names = {version: entry.uri.rpartition("/")[2] for version, entry in entries(blocking).items()}
    assert ftp.folders() == [names[1], names[2], torn.name]  # it may be another trainer's, at work
    publish(publisher, 3)
    publisher.flush()
    assert ftp.folders() == [
        entry.uri.rpartition("/")[2] for version, entry in entries(blocking).items() if version > 1
    ]


def test_a_folder_that_is_gone_is_said_or_means_that_another_took_over(
    ftp: FtpServer, right: WriteAccess, tmp_path: Path, tiny_model: Path
) -> None:
    remote = RemoteVersions(ftp.url, LOG)
    remote.bind(rest=lambda _: True, go_on=right.check)
    store = VersionStore(tmp_path / "local", tiny_model, dtype="fp32")
    entry = store.write(1, 1, 0, store.copy(1, [("a.weight", torch.ones(2))]))
    store.remove(1)
    with pytest.raises(StorageError, match=r"version 1 can't be sent from .*v000001: .*No such file"):
        remote.upload(entry, store.path(1))
    right.lost = True
    with pytest.raises(LeaseLost):
        remote.upload(entry, store.path(1))


def test_a_place_that_can_not_be_written_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"lachesis.weights_dir = 'gopher://x/y': can't be written"):
        RemoteVersions("gopher://x/y", LOG)
    with pytest.raises(StorageError, match=r"lachesis.weights_dir: ftp://127.0.0.1:9/x can't be written to"):
        RemoteVersions("ftp://127.0.0.1:9/x", LOG).make()


@pytest.mark.verl
@pytest.mark.parametrize(
    ("point", "full_every"), [("publish:3", 1), ("uploaded:3", 1), ("announce:3", 1), ("uploaded:3", 4)]
)
def test_a_killed_trainer_publishes_each_version_once_and_whole(
    ftp: FtpServer,
    shared_redis: EmbeddedRedis,
    run_name: str,
    tmp_path: Path,
    tiny_model: Path,
    point: str,
    full_every: int,
) -> None:
    preload()
    run = Run(shared_redis.url, run_name, tmp_path / "state", tiny_model)
    settings = [f"lachesis.weights_dir={ftp.url}", f"lachesis.keep_versions={STEPS}"]
    settings.append(f"lachesis.full_every={full_every}")
    with run.broker() as broker:
        broker.call(fill, broker.broker, groups=2 * STEPS)
        assert run.finish(run.start(*settings, crash_at=point)) == -signal.SIGKILL
        assert [*entries(broker)] == [1, 2]
        assert run.finish(run.start(*settings)) == 0
        found = entries(broker)
        events: Any = broker.call(broker.broker.redis.xlen, broker.broker.keys.weights("main"))
        assert ([*found], events) == (list(range(1, STEPS + 1)), STEPS + 1)  # one is the base model's
    there = ftp.folders(f"weights/{run_name}/main")
    names = [entry.uri.rpartition("/")[2] for entry in found.values()]
    assert there == names if full_every == 1 else ["v000000", *names] == [there[0][:7], *there[1:]]  # 1 builds on 0
    for entry in found.values():
        manifest = msgspec.json.decode(
            (staged(entry, tmp_path / "staged") / "manifest.json").read_bytes(), type=Manifest
        )
        assert manifest.version == entry.version


class Drifting:
    """Weights in bf16 of which a few elements change from version to version."""

    def __init__(self, store: VersionStore, remote: RemoteVersions) -> None:
        self._store, self._remote = store, remote
        self._generator = torch.Generator().manual_seed(0)
        self._weights = torch.randn(200_000, generator=self._generator)

    def publish(self, version: int) -> WeightsEntry:
        changed = torch.rand(len(self._weights), generator=self._generator) < 0.02
        self._weights = torch.where(changed, -self._weights, self._weights)
        copied = self._store.copy(version, [("a.weight", self._weights)])
        return self._remote.upload(self._store.write(version, version, version - 1, copied), self._store.path(version))


def sizes(ftp: FtpServer, entry: WeightsEntry) -> dict[str, int]:
    folder = ftp.folder / "weights" / entry.uri.rpartition("/")[2]
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name.startswith(WEIGHTS)}


def test_versions_between_whole_ones_are_sent_as_differences_and_come_out_to_the_bit(
    ftp: FtpServer, tmp_path: Path, tiny_model: Path
) -> None:
    store = VersionStore(tmp_path / "local", tiny_model, dtype="bf16")
    remote = RemoteVersions(ftp.url, LOG, full_every=3)
    drifting = Drifting(store, remote)
    found = {version: drifting.publish(version) for version in range(1, 8)}
    sent = {version: sizes(ftp, entry) for version, entry in found.items()}
    assert [list(files) for files in sent.values()] == [
        [WEIGHTS], [f"{WEIGHTS}.delta"], [f"{WEIGHTS}.delta"], [WEIGHTS], [f"{WEIGHTS}.delta"], [f"{WEIGHTS}.delta"], [WEIGHTS],
    ]  # fmt: skip
    assert max(sent[version][f"{WEIGHTS}.delta"] for version in (2, 3, 5, 6)) < sent[1][WEIGHTS] / 5
    assert not [path.name for path in (tmp_path / "local").glob(".tmp-*")]

    joined, followed = tmp_path / "joined", tmp_path / "followed"
    for version in (3, 6):  # comes there from the whole one
        whole = (staged(found[version], joined / str(version)) / WEIGHTS).read_bytes()
        assert whole == (store.path(version) / WEIGHTS).read_bytes()
    for version, entry in found.items():
        assert (staged(entry, followed) / WEIGHTS).read_bytes() == (store.path(version) / WEIGHTS).read_bytes()

    again = RemoteVersions(ftp.url, LOG, full_every=3)  # after a restart
    again.collect(7, lambda version: found[version].uri if version in (6, 7) else None)
    assert again.versions() == [4, 5, 6, 7]  # 6 builds on 5, and 5 on 4
    staged(found[6], tmp_path / "late")
    assert list(sizes(ftp, Drifting(store, again).publish(8))) == [
        WEIGHTS
    ]  # what is before it is not known to be there
    assert list(sizes(ftp, Drifting(store, again).publish(9))) == [f"{WEIGHTS}.delta"]


def test_a_spoiled_difference_is_refused_until_the_next_whole_version(
    ftp: FtpServer, tmp_path: Path, tiny_model: Path
) -> None:
    remote = RemoteVersions(ftp.url, LOG, full_every=3)
    drifting = Drifting(VersionStore(tmp_path / "local", tiny_model, dtype="bf16"), remote)
    found = {version: drifting.publish(version) for version in range(1, 5)}
    spoiled = ftp.folder / "weights" / found[2].uri.rpartition("/")[2] / f"{WEIGHTS}.delta"
    raw = bytearray(spoiled.read_bytes())
    raw[len(raw) // 2] ^= 1
    spoiled.write_bytes(raw)
    staged(found[1], tmp_path / "staged")
    for version in (2, 3):
        with pytest.raises(WeightsRefused, match=r"version 2 refused: the SHA-256 of model.safetensors.delta differs"):
            staged(found[version], tmp_path / "staged")
    staged(found[4], tmp_path / "staged")

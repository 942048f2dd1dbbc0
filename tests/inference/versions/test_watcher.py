"""Which version an agent loads, while the store, the collector and Redis do what they like."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio
import numpy as np
import pytest
from published import make_model, publish, random_weights, write_version

from lachesis.broker import Broker, ConfigurationError, EmbeddedRedis
from lachesis.broker.records.versions import PoolRule, ServerStatus
from lachesis.broker.weights.pools import canaries
from lachesis.inference.heartbeat import Heartbeat
from lachesis.inference.versions.model_folder import read_model_folder
from lachesis.inference.versions.staging import Staging
from lachesis.inference.versions.watcher import VersionWatcher
from lachesis.service.logs import configure_logging

pytestmark = pytest.mark.anyio

LOG = configure_logging("test")
NAN = {"model.norm.weight": np.full(64, np.nan, np.float32)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base")


def heartbeat_of(broker: Broker, name: str = "s") -> Heartbeat:
    status = ServerStatus(
        server=name, pool="main", url="http://s", state="starting", version=-1, loading=-1, heartbeat=0.0
    )
    return Heartbeat(broker.registry, status, LOG)


def feed_of(broker: Broker, base: Path | None, heartbeat: Heartbeat | None = None) -> VersionWatcher:
    staging = Staging(Path("/nowhere"), keep=1)  # folders are served where they lie
    return VersionWatcher(broker, "main", base, staging, None, heartbeat or heartbeat_of(broker), LOG)


async def test_it_starts_from_the_newest_and_announces_it_first(broker: Broker, base: Path, tmp_path: Path) -> None:
    for version in (1, 2):
        await publish(broker, base, tmp_path, version)

    found = await feed_of(broker, base).first()

    assert (found.version, found.model.folder) == (2, tmp_path / "v000002")
    assert [status.loading for status in await broker.registry.servers()] == [2]


async def test_a_bad_newest_version_gives_way_to_its_parents(broker: Broker, base: Path, tmp_path: Path) -> None:
    await publish(broker, base, tmp_path, 1)
    await publish(broker, base, tmp_path, 2)
    shutil.rmtree(tmp_path / "v000002")
    await broker.weights.publish("main", write_version(base, tmp_path, 3, weights=random_weights(1) | NAN))
    watcher = feed_of(broker, base)

    assert (await watcher.first()).version == 1
    shutil.rmtree(tmp_path / "v000001")
    assert (await watcher.first()).version == 0


async def test_it_waits_for_a_base_model_in_the_making(broker: Broker, base: Path, tmp_path: Path) -> None:
    async with anyio.create_task_group() as tasks:

        async def appear() -> None:
            await anyio.wait_all_tasks_blocked()
            shutil.copytree(base, tmp_path / "aside")
            (tmp_path / "aside").rename(tmp_path / "later")

        tasks.start_soon(appear)
        with anyio.fail_after(60):
            found = await feed_of(broker, tmp_path / "later").first()

    assert (found.version, found.model.folder) == (0, tmp_path / "later")


async def test_without_a_base_model_it_waits_for_a_version(broker: Broker, base: Path, tmp_path: Path) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish, broker, base, tmp_path, 1)
        with anyio.fail_after(60):
            assert (await feed_of(broker, None).first()).version == 1


async def test_a_base_model_that_can_not_be_served_is_an_error(broker: Broker, base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "tokenizer.json").unlink()

    with pytest.raises(ConfigurationError, match="no tokenizer"):
        await feed_of(broker, folder).first()


async def test_a_version_sglang_can_not_start_from_is_refused_the_second_time(
    broker: Broker, base: Path, tmp_path: Path
) -> None:
    for version in (1, 2):
        await publish(broker, base, tmp_path, version)
    watcher = feed_of(broker, base)

    for expected in (2, 2, 1):
        found = await watcher.first()
        assert found.version == expected
        watcher.did_not_start(found)


async def test_version_0_is_the_base_model_where_its_published_files_are_gone(
    broker: Broker, base: Path, tmp_path: Path
) -> None:
    for version in (0, 1):
        await publish(broker, base, tmp_path, version)
    shutil.rmtree(tmp_path / "v000000")
    assert await broker.pools.set_rule("main", PoolRule("pin", 0), "0-0")
    serving = read_model_folder(tmp_path / "v000001")

    fresh = await feed_of(broker, base).first()
    following = await feed_of(broker, base).next(1, serving, 0.0)

    assert (fresh.version, fresh.model.folder) == (0, base)
    assert following is not None
    assert (following.version, following.model.folder) == (0, base)
    heartbeat = heartbeat_of(broker)
    assert await feed_of(broker, None, heartbeat).next(1, serving, 0.0) is None
    assert "version 0" in heartbeat.status.last_error  # it says why it stays where it is


async def test_a_refused_version_is_not_looked_at_again(broker: Broker, base: Path, tmp_path: Path) -> None:
    await publish(broker, base, tmp_path, 1)
    watcher, model = feed_of(broker, base), read_model_folder(base)
    await broker.weights.publish("main", write_version(base, tmp_path, 2, weights=random_weights(1) | NAN))

    assert await watcher.next(1, model, 0.1) is None
    shutil.rmtree(tmp_path / "v000002")
    shutil.copytree(tmp_path / "v000001", tmp_path / "v000002")
    assert await watcher.next(1, model, 0.1) is None
    await publish(broker, base, tmp_path, 3)
    newest = await watcher.next(1, model, 5)
    assert newest is not None
    assert newest.version == 3


async def test_a_folder_that_appears_late_is_loaded_then(broker: Broker, base: Path, tmp_path: Path) -> None:
    entry = write_version(base, tmp_path, 1)
    Path(entry.uri).rename(tmp_path / "not-visible-yet")
    await broker.weights.publish("main", entry)
    watcher, model = feed_of(broker, base), read_model_folder(base)

    assert await watcher.next(0, model, 0.1) is None
    (tmp_path / "not-visible-yet").rename(entry.uri)
    found = await watcher.next(0, model, 0.1)
    assert found is not None
    assert found.version == 1


async def steer(broker: Broker, rule: PoolRule) -> None:
    judged, _ = await broker.pools.rule("main")
    assert await broker.pools.set_rule("main", rule, judged)


async def test_a_rule_is_followed_at_once_and_back_again(broker: Broker, base: Path, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        await publish(broker, base, tmp_path, version)
    watcher, model = feed_of(broker, base), read_model_folder(base)
    for rule, serving, wanted in (
        (PoolRule("pin", 1), 3, 1),
        (PoolRule("pin", 0), 1, 0),
        (PoolRule("newest"), 0, 3),
    ):
        await steer(broker, rule)
        found = await watcher.next(serving, model, 0)
        assert found is not None
        assert found.version == wanted
        assert await watcher.next(wanted, model, 0) is None
    await steer(broker, PoolRule("pin", 3))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(steer, broker, PoolRule("pin", 2))
        with anyio.fail_after(60):
            assert (await watcher.next(3, model, 60)).version == 2  # type: ignore[union-attr]
    await publish(broker, base, tmp_path, 4)
    assert await watcher.next(2, model, 0.1) is None
    assert (await feed_of(broker, base).first()).version == 2


async def test_a_share_of_the_servers_are_canaries(broker: Broker, base: Path, tmp_path: Path) -> None:
    for version in (1, 2):
        await publish(broker, base, tmp_path, version)
    await steer(broker, rule := PoolRule("canary", 2, 1, 0.25))
    feeds = {}
    for name in ("a", "b", "c", "d"):
        heartbeat = heartbeat_of(broker, name)
        await heartbeat.announce(state="ready")
        feeds[name] = (feed_of(broker, base, heartbeat), heartbeat)

    served = {name: (await watcher.first()).version for name, (watcher, _) in feeds.items()}

    (canary,) = canaries(rule, feeds)
    assert served == {name: 2 if name == canary else 1 for name in feeds}
    assert {heartbeat.status.rule for _, heartbeat in feeds.values()} == {"canary", "rest"}
    await broker.registry.withdraw(canary)
    (successor,) = canaries(rule, feeds.keys() - {canary})
    with anyio.fail_after(60):
        found = await feeds[successor][0].next(1, read_model_folder(base), 5)
    assert found is not None
    assert found.version == 2


async def test_a_canary_that_can_not_be_loaded_leaves_its_server_with_the_rest(
    broker: Broker, base: Path, tmp_path: Path
) -> None:
    await publish(broker, base, tmp_path, 1)
    await broker.weights.publish("main", write_version(base, tmp_path, 2, weights=random_weights(1) | NAN))
    rule = PoolRule("canary", 2, 1, 0.5)
    await steer(broker, rule)
    (canary,) = canaries(rule, ["a", "b"])
    for name in ("a", "b"):
        await heartbeat_of(broker, name).announce()
    heartbeat = heartbeat_of(broker, canary)

    assert (await feed_of(broker, base, heartbeat).first()).version == 1
    assert heartbeat.status.rule == "canary"
    assert "version 2 refused" in heartbeat.status.last_error


async def test_the_newest_one_good_takes_the_place_of_a_bad_newest(broker: Broker, base: Path, tmp_path: Path) -> None:
    for version in (1, 2):
        await publish(broker, base, tmp_path, version)
    await broker.weights.publish("main", write_version(base, tmp_path, 3, weights=random_weights(1) | NAN))

    found = await feed_of(broker, base).next(1, read_model_folder(base), 0)

    assert found is not None
    assert found.version == 2
    assert found.passed_over.startswith("version 3 refused")


async def test_the_heartbeat_goes_on_when_redis_comes_back(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        broker = await Broker.connect(redis.url)
        heartbeat = heartbeat_of(broker)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(heartbeat.run)
            redis.stop()
            heartbeat.change(state="ready", version=7)
            redis.start()
            with anyio.fail_after(60):
                while [status.version for status in await broker.registry.servers()] != [7]:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
        await broker.aclose()

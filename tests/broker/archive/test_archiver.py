"""The archiver, as real processes that are killed: every trained batch is archived once, and none is freed before."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from scored import group
from trained_run import BATCH, archiver, read, train, unfreed
from warm import WarmProcess

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.archive.archiver import Archiver, stop_archiving
from lachesis.broker.archive.segments import Archive
from lachesis.broker.audit import audit
from lachesis.broker.errors import Conflict
from lachesis.service.logs import configure_logging

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
POINTS = ("segment", "segment-written", "segment-named", "segment-covered")


async def ended(process: WarmProcess, timeout_s: float = 60) -> tuple[int, str]:
    """Exit code and everything it said."""
    out, err = await asyncio.to_thread(process.communicate, timeout=timeout_s)
    assert process.returncode is not None
    return process.returncode, out + err


@asynccontextmanager
async def running(process: WarmProcess) -> AsyncIterator[WarmProcess]:
    try:
        yield process
    finally:
        process.kill()
        await ended(process)


async def until(broker: Broker, covered: int) -> None:
    with anyio.fail_after(30):
        while (await broker.queue.retention.readers()).get("archive", -1) < covered:  # noqa: ASYNC110
            await anyio.sleep(0.05)


async def archive_in_process(broker: Broker, url: str) -> Archiver:
    found = Archiver(
        broker, Archive(url), configure_logging("test"), policy="main", segment_bytes=900, every_s=0.1, lease_s=5
    )
    await found.run(lambda: False, once=True)
    return found


@pytest.mark.parametrize("point", POINTS)
async def test_killed_anywhere_it_loses_and_repeats_nothing(broker: Broker, tmp_path: Path, point: str) -> None:
    url, run = broker.url, broker.keys.run
    stored = await train(broker, 9, covered=False)
    killed = archiver(url, run, tmp_path, "--once", crash_at=f"{point}:4")
    code, said = await ended(killed)
    assert code == -signal.SIGKILL, said
    await broker.queue.retire("main", 9)
    left = await unfreed(broker)
    archived = {found.batch.step: found.blobs for found in read(tmp_path)}
    assert min(left) == (4 if point != "segment-covered" else max(archived) + 1)
    assert left | archived == stored

    stored |= await train(broker, 2, start=1)
    code, said = await ended(archiver(url, run, tmp_path, "--once"))
    assert code == 0, said
    found = read(tmp_path)
    assert [archived.batch.step for archived in found] == list(range(1, 12))
    assert {archived.batch.step: archived.blobs for archived in found} == stored
    assert all(one.ledger.gids == one.batch.gids for one in found)
    firsts = [segment.first for segment in Archive(str(tmp_path)).segments()]
    assert len(set(firsts)) == len(firsts)
    assert await unfreed(broker) == {}
    assert len(await broker.redis.keys(broker.keys.blob("*"))) == len(await broker.queue.queued())


async def test_killed_again_and_again_beside_a_trainer(broker: Broker, tmp_path: Path) -> None:
    stored: dict[int, list[bytes]] = {}
    chance = random.Random(7)
    for kill in range(6):
        async with running(archiver(broker.url, broker.keys.run, tmp_path)) as process:
            await until(broker, 0)
            for _ in range(chance.randrange(5, 60)):
                stored |= await train(broker, 1, start=len(stored) + 1)
                await anyio.sleep(chance.random() * 0.05)
            if kill:
                process.kill()
                await ended(process)
        archived = {found.batch.step: found.blobs for found in read(tmp_path)}
        assert archived | await unfreed(broker) == stored
    code, said = await ended(archiver(broker.url, broker.keys.run, tmp_path, "--once"))
    assert code == 0, said
    found = read(tmp_path)
    assert [(one.batch.step, one.blobs) for one in found] == sorted(stored.items())
    assert await unfreed(broker) == {}


async def test_what_is_not_trained_is_not_archived(broker: Broker) -> None:
    await train(broker, 1, covered=False)
    for number in range(BATCH):
        await broker.queue.put(f"open{number}", group(number + 1000, 1), v_min=0, v_max=0)
    assert await broker.queue.lease_or_form("main", "t", BATCH, lapse_s=60) is not None
    url = f"memory://{broker.keys.run}"
    assert (await archive_in_process(broker, url)).steps == 1
    assert [found.batch.step for found in Archive(url).read(note=pytest.fail)] == [1]


async def test_what_the_policy_gave_up_is_not_archived_and_not_held_back(broker: Broker) -> None:
    url = f"memory://{broker.keys.run}"
    await archive_in_process_nothing(broker)
    await broker.queue.subscribe("shadow")
    await train(broker, 2)
    for number in range(BATCH):
        await broker.queue.put(f"bad{number}", group(number + 1000, 1), v_min=0, v_max=0)
    for _ in range(10):  # main gives up what was waiting and these
        await broker.queue.lease_or_form("main", "t", BATCH, lapse_s=0, max_deliveries=1)
    assert await broker.queue.settled("main") >= 3
    for _ in range(2):
        await archive_in_process(broker, url)
        assert [found.batch.step for found in Archive(url).read(note=pytest.fail)] == [1, 2]
        assert (await broker.queue.retention.readers())["archive"] == await broker.queue.settled("main")
    assert 3 in await unfreed(broker)  # for the shadow
    assert (await audit(broker)).findings == []


async def test_a_batch_nobody_can_train_becomes_dead_letters_though_it_would_be_archived(broker: Broker) -> None:
    await archive_in_process_nothing(broker)
    for number in range(BATCH):
        await broker.queue.put(f"bad{number}", group(number, 1), v_min=0, v_max=0)
    for _ in range(2):
        await broker.queue.lease_or_form("main", "t", BATCH, lapse_s=0, max_deliveries=1)
    assert [letter.entry.gid for letter in await broker.dead.accepted()] == [f"bad{number}" for number in range(BATCH)]
    assert await unfreed(broker) == {}
    assert (await broker.queue.retention.kept()).bytes == 0
    assert (await audit(broker)).findings == []


async def test_sigterm_writes_what_was_gathered(broker: Broker, tmp_path: Path) -> None:
    options = ("--segment-s", "600", "--segment-bytes", "1GB")
    async with running(archiver(broker.url, broker.keys.run, tmp_path, *options)) as process:
        await until(broker, 0)
        stored = await train(broker, 3)
        await anyio.sleep(1)
        assert await unfreed(broker) == stored
        process.terminate()
        code, said = await ended(process)
    assert (code, "archived 3 batches" in said) == (0, True), said
    assert {found.batch.step: found.blobs for found in read(tmp_path)} == stored
    assert await unfreed(broker) == {}


async def test_a_second_one_is_refused_and_takes_over_after_a_kill(broker: Broker, tmp_path: Path) -> None:
    url, run = broker.url, broker.keys.run
    async with running(archiver(url, run, tmp_path)) as first:
        await until(broker, 0)
        code, said = await ended(archiver(url, run, tmp_path))
        assert code == 1
        assert "is being archived by" in said
        assert f":{first.pid}: stop that process first" in said
        first.kill()
        await ended(first)
        stored = await train(broker, 2)
        code, said = await ended(archiver(url, run, tmp_path, "--once"))
        assert code == 0, said
    assert {found.batch.step: found.blobs for found in read(tmp_path)} == stored


async def test_a_segment_cut_off_on_another_store_is_written_again(broker: Broker) -> None:
    url = f"memory://{broker.keys.run}"
    stored = await train(broker, 3, covered=False)
    await archive_in_process(broker, url)
    archive = Archive(url)
    last = archive.segments()[-1]
    whole = archive._fs.cat_file(last.path)
    archive._fs.pipe_file(last.path, whole[:-30])
    await broker.redis.hset(broker.keys.state, "covered:archive", last.first - 1)  # as it is if it died while writing
    stored |= await train(broker, 2, start=1, covered=False)
    await archive_in_process(broker, url)
    notes: list[str] = []
    found = list(archive.read(note=notes.append))
    assert [(one.batch.step, one.blobs) for one in found] == sorted(stored.items())
    assert all("is cut off" in note for note in notes)


async def test_an_archive_of_another_history_is_refused(broker: Broker) -> None:
    url = f"memory://{broker.keys.run}"
    await train(broker, 3)
    await broker.queue.retention.keep(1 << 30)
    await train(broker, 2, start=1)
    await archive_in_process(broker, url)

    other = await Broker.connect(broker.url, f"{broker.keys.run}-other")
    await train(other, 1, covered=False)
    with pytest.raises(Conflict, match=f"it is of run '{broker.keys.run}'. Give another --to"):
        await archive_in_process(other, url)
    await other.aclose()

    await archive_in_process(broker, f"{url}-next")  # a new place: goes on there
    await train(broker, 2, start=2)
    await archive_in_process(broker, f"{url}-next")
    assert [found.batch.step for found in Archive(f"{url}-next").read(note=pytest.fail)] == [6, 7]
    with pytest.raises(Conflict, match="it ends at step 5, and batches up to step 7 went to another place"):
        await archive_in_process(broker, url)

    await broker.reset()
    await train(broker, 8, start=3, covered=False)
    with pytest.raises(Conflict, match="its step 7 is not this run's: the run was reset since"):
        await archive_in_process(broker, f"{url}-next")


async def test_a_reset_or_a_stop_ends_it_and_holds_nothing_back(broker: Broker, tmp_path: Path) -> None:
    for end in (stop_archiving, Broker.reset):
        async with running(archiver(broker.url, broker.keys.run, tmp_path / end.__name__)) as process:
            await until(broker, 0)
            await end(broker)
            code, said = await ended(process)
        assert code == 1
        assert "is no longer archived: `archive --stop` was called, or it was reset" in said
        await train(broker, 1, start=int(end is Broker.reset))
        assert await unfreed(broker) == {}


async def test_stopping_frees_what_only_the_archive_needed(broker: Broker) -> None:
    await archive_in_process_nothing(broker)
    stored = await train(broker, 3)
    assert await unfreed(broker) == stored
    assert await stop_archiving(broker)
    assert await unfreed(broker) == {}
    assert not await stop_archiving(broker)
    assert await broker.queue.retention.archiver() is None


async def archive_in_process_nothing(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await archive_in_process(broker, f"memory://{broker.keys.run}")


async def test_a_full_redis_is_drained_by_an_archiver_that_starts_then(
    redis_server: EmbeddedRedis, tmp_path: Path
) -> None:
    broker = await Broker.connect(redis_server.url)
    await archive_in_process_nothing(broker)  # then it dies
    stored = await train(broker, 3)
    used = int((await broker.redis.info("memory"))["used_memory"])
    await broker.redis.config_set("maxmemory", used // 2)
    code, said = await ended(archiver(redis_server.url, "default", tmp_path, "--once"))
    assert code == 0, said
    assert {found.batch.step: found.blobs for found in read(tmp_path)} == stored
    assert await unfreed(broker) == {}
    await broker.aclose()


async def test_a_store_that_fails_frees_nothing(broker: Broker, tmp_path: Path) -> None:
    stored = await train(broker, 3, covered=False)
    folder = tmp_path / "archive"
    async with running(archiver(broker.url, broker.keys.run, folder)) as process:
        await until(broker, 3)
        moved = folder.rename(tmp_path / "moved")
        stored |= await train(broker, 1, start=1)
        code, said = await ended(process)
    assert code == 1
    assert "can't write to the archive" in said
    assert "Nothing was freed that is not in it" in said
    moved.rename(folder)
    assert {found.batch.step: found.blobs for found in read(folder)} | await unfreed(broker) == stored

"""Replay, by the real command on a real Redis: the same batches again, whatever interrupts it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path

import anyio
import commands
import pytest

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.keys import ARCHIVE
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.records.versions import WeightsEntry

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
BATCH, STEPS = 6, 8
SIZES = (4, 2, 1, 3, 5)


async def lachesis(*arguments: str) -> tuple[int, str, str]:
    done = await asyncio.to_thread(commands.lachesis, *arguments)
    return done.returncode, done.stdout, done.stderr


def rollout(number: int) -> ScoredGroup:
    """Ragged, with every kind of field, and numbers that only a float64 or an int64 holds."""
    lengths = [3 + (number + index) % 4 for index in range(SIZES[number % len(SIZES)])]
    tokens = [[(1 << 40) + number if number % 3 == 0 else 7, *range(1, length)] for length in lengths]
    return ScoredGroup(
        tokens=tokens,
        masks=[[-100, *row[1:]] for row in tokens],
        scores=[0.1 * (number + index) for index in range(len(tokens))],
        inference_logprobs=[[1.0, *(-0.1 * token for token in row[1:])] for row in tokens],
        advantages=[[-0.0, *([0.5] * (len(row) - 1))] for row in tokens] if number % 2 else None,
        messages=[[{"role": "user", "content": f"ä{number}"}] for _ in tokens],
        env_id=number % 3,
    )


async def train(broker: Broker, steps: int, *, covered: bool = True) -> list[list[Group]]:
    """Lease, read and commit batches."""
    found: list[list[Group]] = []
    await broker.queue.subscribe("main")
    while len(found) < steps:
        lease = await broker.queue.lease_or_form("main", "t", BATCH, lapse_s=60)
        assert lease is not None
        batch = lease.batch
        found.append(await broker.queue.fetch(batch.gids))
        entry = LedgerEntry(
            step=batch.step, gids=batch.gids, n=batch.n, tok=batch.tok, v_before=0, v_after=0, v_min=0, lag=0, replica="t",
            reward=0.0, loss=0.0, seconds=0.0,
        )  # fmt: skip
        await broker.queue.commit("main", lease, entry)
        if covered:
            await broker.queue.retire("main", batch.step)
    return found


@pytest.fixture
async def original(broker: Broker, tmp_path: Path) -> list[list[Group]]:
    """Eight trained batches, which are in Redis and in the archive; version k made the tenth k of groups."""
    await broker.queue.retention.keep(1 << 30)
    for number in range(40):
        await broker.queue.put(f"g{number}", rollout(number), v_min=number // 10, v_max=number // 10)
    batches = await train(broker, STEPS)
    code, said, error = await lachesis(
        "archive", *where(broker), "--to", str(tmp_path), "--once", "--segment-bytes", "1kB"
    )
    assert code == 0, error
    assert f"archived {STEPS} batches" in said
    return batches


@pytest.fixture
async def other(broker: Broker) -> AsyncIterator[Broker]:
    found = await Broker.connect(broker.url, f"{broker.keys.run}-again")
    yield found
    await found.aclose()


def where(broker: Broker) -> tuple[str, ...]:
    return "--redis-url", broker.url, "--run", broker.keys.run


def same(one: Group, two: Group) -> bool:
    """Equal in every array, bit for bit, and in everything else but the versions."""
    rows = [
        (ones or [], twos or [])
        for ones, twos in (
            (one.tokens, two.tokens),
            (one.masks, two.masks),
            ([one.scores], [two.scores]),
            (one.advantages, two.advantages),
            (one.ref_logprobs, two.ref_logprobs),
            (one.inference_logprobs, two.inference_logprobs),
        )
    ]
    arrays = all(
        len(ones) == len(twos)
        and all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(ones, twos, strict=True))
        for ones, twos in rows
    )
    return arrays and (one.gid, one.env, one.rest) == (two.gid, two.env, two.rest)


async def test_a_trainer_gets_the_same_batches_in_the_same_order(
    broker: Broker, other: Broker, original: list[list[Group]], tmp_path: Path
) -> None:
    await other.weights.publish("main", WeightsEntry(17, 17, "file:///v17", "0", 1, "BF16", 16))
    groups = sum(map(len, original))
    for source in (("--archive", str(tmp_path)), ("--from-run", broker.keys.run, "--steps", f"1:{STEPS}")):
        code, said, error = await lachesis("replay", *where(other), *source)
        assert code == 0, error
        assert f"{groups} groups ({STEPS} batches, {BATCH * STEPS} sequences" in said
        assert (f"{groups} of them were there already" in said) == (source[0] == "--from-run")
    again = await train(other, STEPS)
    assert [len(batch) for batch in again] == [len(batch) for batch in original]
    for one, two in zip(chain(*original), chain(*again), strict=True):
        assert same(one, two)
        assert (two.v_min, two.v_max) == (17, 17)
    assert (await other.queue.status()).groups == 0


RANGES = (
    (("--steps", "3:5"), range(3, 6), range(4)),
    (("--steps", "7:"), range(7, STEPS + 1), range(4)),
    (("--steps", ":2"), range(1, 3), range(4)),
    (("--steps", "4"), range(4, 5), range(4)),
    (("--steps", "1:8", "--versions", "1:1"), range(1, STEPS + 1), range(1, 2)),
    (("--steps", "2:8", "--versions", ":0"), range(2, STEPS + 1), range(1)),
)


@pytest.mark.parametrize("source", ["archive", "run"])
async def test_ranges(broker: Broker, other: Broker, original: list[list[Group]], tmp_path: Path, source: str) -> None:
    origin = ("--archive", str(tmp_path)) if source == "archive" else ("--from-run", broker.keys.run)
    for options, steps, versions in RANGES:
        await other.forget()
        code, _, error = await lachesis("replay", *where(other), *origin, *options, "--keep-versions")
        assert code == 0, error
        wanted = [group for step in steps for group in original[step - 1] if group.v_min in versions]
        queued = [entry for _, entry in await other.queue.queued()]
        assert [(entry.gid, entry.v_min, entry.v_max) for entry in queued] == [
            (g.gid, g.v_min, g.v_max) for g in wanted
        ]


async def test_a_time_range(broker: Broker, other: Broker, original: list[list[Group]], tmp_path: Path) -> None:
    formed = [batch.formed_at for batch in await broker.queue.batches()]
    since, until = (formed[1] + formed[2]) / 2, (formed[4] + formed[5]) / 2
    times = ("--since", f"{since:.6f}", "--until", f"{until:.6f}")
    code, _, error = await lachesis("replay", *where(other), "--archive", str(tmp_path), *times)
    assert code == 0, error
    got = {entry.gid for _, entry in await other.queue.queued()}
    wanted = {
        gid for batch in await broker.queue.batches() if formed[2] <= batch.formed_at <= formed[4] for gid in batch.gids
    }
    assert got == wanted
    assert len(got) < sum(map(len, original))


async def test_a_live_runs_queue_comes_after_its_batches(
    broker: Broker, other: Broker, original: list[list[Group]]
) -> None:
    queued = [entry.gid for _, entry in await broker.queue.queued()]
    assert queued
    code, _, error = await lachesis("replay", *where(other), "--from-run", broker.keys.run)
    assert code == 0, error
    batched = [group.gid for batch in original for group in batch]
    assert [entry.gid for _, entry in await other.queue.queued()] == batched + queued


async def test_a_dry_run_counts_and_stores_nothing(other: Broker, original: list[list[Group]], tmp_path: Path) -> None:
    code, said, _ = await lachesis("replay", *where(other), "--archive", str(tmp_path), "--dry-run")
    assert code == 0
    assert f"{sum(map(len, original))} groups ({STEPS} batches, {BATCH * STEPS} sequences" in said
    assert "would be replayed" in said
    assert (await other.queue.status()).accepted == 0


async def test_it_waits_for_a_trainer_while_the_queue_is_full_and_goes_on_where_it_was_killed(
    other: Broker, original: list[list[Group]], tmp_path: Path
) -> None:
    entries = sum(len(batch) for batch in original)
    command = [*commands.LACHESIS, "replay", *where(other), "--archive", str(tmp_path), "--queue-quota-bytes", "1200"]
    again: list[list[Group]] = []
    for attempt in range(2):
        replay = commands.python.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            until = time.monotonic() + 60
            while replay.poll() is None and not (attempt == 0 and len(again) >= 3):
                assert time.monotonic() < until
                await other.queue.subscribe("main")
                assert (await other.queue.status()).bytes <= 1200
                if await other.queue.form(BATCH):
                    again += await train(other, 1)
                await anyio.sleep(0.02)
        finally:
            replay.kill()
            out, error = await asyncio.to_thread(replay.communicate)
    assert replay.returncode == 0, error
    assert f"{entries} groups" in out
    while await other.queue.form(BATCH):
        again += await train(other, 1)
    assert [[group.gid for group in batch] for batch in again] == [[group.gid for group in batch] for batch in original]


ERRORS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    ((), 2, "replay from where? Give --archive DIR-OR-URL or --from-run RUN"),
    (("--archive", "a", "--from-run", "b"), 2, "replay from where?"),
    (("--archive", "nonsense://x"), 2, "archive = 'nonsense://x': "),
    (("--archive", "{empty}"), 2, "there are no segments (*.lachesis)"),
    (("--archive", "{empty}/none"), 2, "there are no segments (*.lachesis)"),
    (("--archive", "{foreign}"), 1, "another version of Lachesis wrote it"),
    (
        ("--archive", "{full}", "--steps", "90:100"),
        1,
        f"no group is in the chosen range; the archive holds steps 1 to {STEPS}",
    ),
    (("--archive", "{full}", "--steps", "5:4"), 2, "--steps = '5:4': the first is greater than the last"),
    (("--archive", "{full}", "--steps", "a:b"), 2, "--steps = 'a:b': must be FIRST:LAST"),
    (("--archive", "{full}", "--since", "2026-01-02", "--until", "2026-01-01"), 2, "is before --since"),
    (("--archive", "{full}", "--since", "soon"), 2, "--since = 'soon'"),
    (("--from-run", "{run}"), 2, "replay into another run"),
    (("--from-run", "never-was"), 2, "--from-run = 'never-was': no such run; there"),
)


@pytest.mark.usefixtures("original")
async def test_what_can_not_be_replayed_is_one_clear_line(other: Broker, tmp_path: Path) -> None:
    for name in ("empty", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "0000000001-0000000002.lachesis").write_bytes(b"lachesis archive 9\nwhatever")
    names = {"empty": tmp_path / "empty", "foreign": tmp_path / "foreign", "full": tmp_path, "run": other.keys.run}
    for options, code, says in ERRORS:
        found, _, error = await lachesis("replay", *where(other), *(option.format(**names) for option in options))
        assert (found, len(error.splitlines())) == (code, 1), error
        assert says in error


async def test_notes_say_what_an_archive_lacks(other: Broker, original: list[list[Group]], tmp_path: Path) -> None:
    segments = sorted(tmp_path.glob("*.lachesis"))
    assert len(segments) > 2
    segments[1].unlink()
    code, _, error = await lachesis("replay", *where(other), "--archive", str(tmp_path), "--dry-run")
    assert code == 0
    assert "note: the archive does not hold steps" in error
    whole = segments[0].read_bytes()
    segments[0].write_bytes(whole[:200] + b"?" + whole[201:])
    code, _, error = await lachesis("replay", *where(other), "--archive", str(tmp_path))
    assert code == 1
    assert "is damaged before byte" in error


async def test_status_tells_of_an_archiver_that_holds_everything_back(
    broker: Broker, original: list[list[Group]]
) -> None:
    await broker.queue.retention.keep(0)
    await broker.queue.retention.free()
    for number in range(100, 110):
        await broker.queue.put(f"g{number}", rollout(number), v_min=0, v_max=0)
    await train(broker, 2)
    code, said, error = await lachesis("status", *where(broker))
    assert code == 1, error  # nobody trains it
    line = " ".join(said.split())
    assert f"archive steps up to {STEPS} of {STEPS + 2} in" in line
    assert "kept 2 batches" in line
    raw = await broker.queue.retention.archiver()
    assert raw is not None
    stale = f'{{"who":"h:1","url":"{raw.url}","policy":"main","bytes":1,"heartbeat":{time.time() - 600}}}'
    await broker.redis.hset(broker.keys.state, "archiver", stale)
    line = " ".join((await lachesis("status", *where(broker)))[1].split())
    assert "its archiver is silent since 10 min ago, and nothing is freed until it runs again" in line

    code, said, _ = await lachesis("archive", *where(broker), "--stop")
    assert (code, said) == (0, f"run {broker.keys.run!r} is no longer archived\n")
    assert ARCHIVE not in await broker.queue.retention.readers()
    assert (await broker.queue.retention.kept()).batches == 0
    assert "archive" not in (await lachesis("status", *where(broker)))[1]


async def test_retention_is_set_and_shown(broker: Broker, original: list[list[Group]]) -> None:
    code, said, _ = await lachesis("retention", *where(broker), "--keep-bytes", "2GiB")
    assert code == 0
    assert "trained batches are kept while all batches take at most 2.0GiB; 8 batches now" in said
    assert "archive needs those after step 8" in said
    code, said, _ = await lachesis("retention", *where(broker), "--keep-bytes", "0")
    assert "trained batches are freed at once; no batches now" in said
    code, _, error = await lachesis("retention", *where(broker), "--keep-bytes", "some")
    assert code == 2
    assert "--keep-bytes = 'some'" in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give either --to DIR-OR-URL, or --stop"),
        (("--to", "x", "--stop"), "give either --to DIR-OR-URL, or --stop"),
        (("--to", "nonsense://x"), "archive = 'nonsense://x': "),
        (("--to", "/dev/null"), "can't write there"),
    ],
)
async def test_what_can_not_be_archived_is_one_clear_line(
    shared_redis: EmbeddedRedis, run_name: str, options: tuple[str, ...], says: str
) -> None:
    code, _, error = await lachesis("archive", "--redis-url", shared_redis.url, "--run", run_name, *options)
    assert (code, len(error.splitlines())) == (2, 1), error
    assert says in error

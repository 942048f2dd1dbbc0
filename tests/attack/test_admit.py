"""What somebody else wrote, into a run: an archive, another run, a dead letter, a post. Refused in a line, and the rest goes on."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import httpx
import msgspec
import numpy as np
import pytest
import zstandard
from scored import group, trained
from trajectories import TRAINER, serving

from lachesis.broker import Broker, InvalidGroup
from lachesis.broker.archive.segments import Archive, Archived, Header
from lachesis.broker.audit import audit
from lachesis.broker.records.blobs import CODEC, to_blob
from lachesis.broker.records.groups import DeadEntry, ScoredGroup
from lachesis.broker.records.packing import PACKED_TYPE, pack
from lachesis.broker.records.steps import BatchEntry
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio
SOUND = pack(group(1))
BOMB = b"\x28\xb5\x2f\xfd\xe0" + (1 << 33).to_bytes(8, "little") + b"\x03\x00\x10\x00"  # says: 8 GiB
HOSTILE_IDS = ("a b", "a\nb", "}:tokens{x}", "\x1b[2J", "../x", "refused-x", "", "é", "g" * 129, "g\n")


def blob(packed: bytes, gid: str, v_min: Any = 0, v_max: Any = 0, **more: Any) -> bytes:
    return to_blob(packed, gid, v_min=v_min, v_max=v_max, **more)


def scored(**changed: Any) -> bytes:
    """A packed group of one sequence, some fields of which are others."""
    fields: dict[str, Any] = {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [1.0], **changed}
    return pack(ScoredGroup(**fields))


def with_rest(value: bytes) -> bytes:
    """A packed group with `images` of msgpack's own making."""
    plain = zstandard.ZstdDecompressor().decompress(scored(images="IMAGES"))
    return zstandard.ZstdCompressor().compress(plain.replace(msgspec.msgpack.encode("IMAGES"), value))


SPOILT: dict[str, tuple[Callable[[str], bytes], str]] = {
    "nan-score": (lambda gid: blob(scored(scores=[math.nan]), gid), "scores[0] = nan: must be finite"),
    "infinite": (lambda gid: blob(scored(advantages=[[0.0, math.inf]]), gid), "advantages[0][1] = inf: must be finite"),
    "ragged": (lambda gid: blob(scored(masks=[[1]]), gid), "masks[0] = '1 values': must be as long as its tokens, 2"),
    "empty": (lambda gid: blob(scored(tokens=[], masks=[], scores=[]), gid), "must hold at least one sequence"),
    "negative": (lambda gid: blob(scored(tokens=[[1, -5]]), gid), "tokens[0] = -5: token ids must not be negative"),
    "bomb": (lambda gid: blob(BOMB, gid), "body = '8589934592 bytes': must not decompress to more than"),
    "pickle": (lambda gid: b"\x80\x04cos\nsystem\n", "must be a stored group"),
    "nothing": (lambda gid: b"", "must be a stored group"),
    "garbage": (lambda gid: blob(b"garbage", gid), "must be one zstd frame"),
    "version-2-63": (lambda gid: msgspec.msgpack.encode([gid, 2**63, 2**63, SOUND]), "must be versions, 0 to 2^53"),
    "version-minus": (lambda gid: blob(SOUND, gid, -7, 3), "must be versions, 0 to 2^53, the oldest first"),
    "version-order": (lambda gid: blob(SOUND, gid, 5, 3), "must be versions, 0 to 2^53, the oldest first"),
    "span": (lambda gid: blob(scored(), gid, versions=[((7, 0, 2),)]), "must be of a version between v_min and v_max"),
    "sampled": (
        lambda gid: blob(scored(), gid, sampled_logprobs=[np.array([math.nan, 1.0])]),
        "sampled_logprobs[0][0] = nan: must be finite",
    ),
    "sampled-rows": (
        lambda gid: blob(scored(), gid, sampled_logprobs=[np.ones(9)]),
        "sampled_logprobs[0] = '9 values'",
    ),
    "another-id": (lambda gid: blob(SOUND, "b" * 24), "must be the id that it is kept under, 'another-id'"),
    "message": (lambda gid: blob(scored(messages=[[{"x": 1}]]), gid), "Message must have 'role' and 'content' fields"),
    "deep": (lambda gid: blob(with_rest(b"\x91" * 300 + b"\x90"), gid), "must not be nested deeper than 250 levels"),
    "too-deep": (lambda gid: blob(with_rest(b"\x91" * 100_000 + b"\x90"), gid), "must be a packed group"),
    "lists": (
        lambda gid: blob(with_rest(b"\xdd" + (10**7).to_bytes(4, "big") + b"\x90" * 10**7), gid),
        "must not hold more than",
    ),
    "spans": (
        lambda gid: msgspec.msgpack.encode([gid, 0, 0, SOUND, [[]] * 300_000]),
        "must not hold more than 250000 lists and maps",
    ),
    "nan-inside": (
        lambda gid: blob(with_rest(msgspec.msgpack.encode([math.nan])), gid),
        "images[0] = nan: must be finite",
    ),
    "bytes-inside": (lambda gid: blob(with_rest(b"\xc4\x01x"), gid), "must be what JSON can express"),
    "keys-inside": (lambda gid: blob(with_rest(b"\x81\x01\x01"), gid), "must be what JSON can express"),
    "env": (lambda gid: blob(scored(env_id=2**64 - 1), gid), f"env_id = {2**64 - 1}: must fit"),
}


def batch(step: int, blobs: dict[str, bytes], codec: str = CODEC) -> tuple[Header, list[Archived]]:
    entry = BatchEntry(step, tuple(blobs), n=max(1, len(blobs)), tok=1, v_min=0, v_max=0, formed_at=time.time())
    return Header("elsewhere", codec, 1.0), [Archived(entry, trained(entry), list(blobs.values()), codec)]


async def replay(broker: Broker, *arguments: str) -> tuple[int, str, list[str]]:
    where = ("--redis-url", broker.url, "--run", broker.keys.run)
    done = await asyncio.to_thread(commands.lachesis, "replay", *where, *arguments)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr.splitlines()


async def test_of_a_hostile_archive_what_is_sound_is_replayed_once_and_the_rest_is_named(
    broker: Broker, tmp_path: Path
) -> None:
    archive = Archive(str(tmp_path))
    archive.prepare()
    mixed = {"sound-1": blob(pack(group(1)), "sound-1"), **{gid: make(gid) for gid, (make, _) in SPOILT.items()}}
    archive.write(*batch(1, {**mixed, "sound-2": blob(pack(group(2)), "sound-2")}))
    archive.write(*batch(2, {gid: blob(SOUND, gid) for gid in HOSTILE_IDS}))
    foreign = archive.write(*batch(3, {"sound-9": blob(SOUND, "sound-9")}, codec="of another release"))
    damaged = Path(archive.write(*batch(4, {"sound-9": blob(SOUND, "sound-9")})).path)
    damaged.write_bytes(damaged.read_bytes()[:140] + b"?" * 20 + damaged.read_bytes()[160:])
    (tmp_path / "0000000005-0000000005.lachesis").write_bytes(b"\x1f\x8b something else")
    archive.write(*batch(6, {"sound-3": blob(pack(group(3)), "sound-3")}))

    for stored in (3, 0):
        code, said, errors = await replay(broker, "--archive", str(tmp_path))
        lines = [line for line in errors if line.startswith("refused: ")]
        assert (code, len(errors)) == (1, len(lines) + 1)  # and the note of steps that are missing
        assert "3 groups (2 batches, 6 sequences" in said
        assert f"; {len(lines)} groups or segments were refused" in said
        assert ("3 of them were there already" in said) == (stored == 0)
        assert [entry.gid for _, entry in await broker.queue.queued()] == ["sound-1", "sound-2", "sound-3"]
    first = f"{tmp_path}/0000000001-0000000001.lachesis, step 1, group "
    for gid, (_, rule) in SPOILT.items():
        (line,) = [line for line in lines if f"group {gid!r}: " in line]
        assert line.startswith(f"refused: {first}")
        assert rule in line
    rule = "must be 1 to 128 letters, digits, '-' and '~', and not begin with 'refused-'"
    assert sum(rule in line for line in lines) == len(HOSTILE_IDS)
    for segment, why in (
        (foreign.path, "codec = 'of another release'"),
        (str(damaged), "damaged"),
        ("5.lachesis", "no segment"),
    ):
        assert sum(segment in line and why in line for line in lines) == 1
    assert len(lines) == len(SPOILT) + len(HOSTILE_IDS) + 3
    assert all(len(line) < 1500 and line.isprintable() for line in lines)
    assert (await audit(broker)).findings == []


async def test_what_was_replayed_is_handed_out(broker: Broker, tmp_path: Path) -> None:
    archive = Archive(str(tmp_path))
    archive.prepare()
    archive.write(*batch(1, {"nan": SPOILT["nan-score"][0]("nan"), "a b": blob(SOUND, "a b"), "s": blob(SOUND, "s")}))
    assert (await replay(broker, "--archive", str(tmp_path)))[0] == 1
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/register", json={**TRAINER, "batch_size": 2})).status_code == 200
        answers = [await client.get("/batch") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [len(answer.json()["batch"] or ()) for answer in answers] == [1, 0]


async def test_of_a_hostile_run_what_is_sound_is_replayed(broker: Broker) -> None:
    """Blobs that were overwritten behind the broker's back, in a batch and in the queue."""
    source = broker.for_run(f"{broker.keys.run}-source")
    for number in range(6):
        await source.queue.put(f"g{number}", group(number), v_min=0, v_max=0)
    await source.queue.subscribe("main")
    assert await source.queue.form(8) == 1
    for gid, make in (("g1", SPOILT["nan-score"][0]), ("g2", SPOILT["bomb"][0]), ("g5", SPOILT["pickle"][0])):
        await source.redis.set(source.keys.blob(gid), make(gid))
    code, _, lines = await replay(broker, "--from-run", source.keys.run)
    assert code == 1
    assert [entry.gid for _, entry in await broker.queue.queued()] == ["g0", "g3", "g4"]
    where = [line.partition(": ")[2].rpartition(": ")[0].partition(": ")[0] for line in lines]
    run = f"run {source.keys.run}"
    assert where == [f"{run}, step 1, group 'g1'", f"{run}, step 1, group 'g2'", f"{run}, queued, group 'g5'"]


async def test_a_dead_letter_whose_data_was_spoilt_stays_one(broker: Broker) -> None:
    for gid, make in (("bad", SPOILT["nan-score"][0]("bad")), ("good", blob(SOUND, "good")), ("odd", b"\x00")):
        await broker.redis.set(broker.keys.blob(gid), make)
        entry = msgspec.structs.asdict(DeadEntry(gid, "stale", 0, "by hand"))
        await broker.redis.xadd(broker.keys.dead, entry)
        await broker.redis.hincrby(broker.keys.state, "dead", 1)
        await broker.redis.hincrby(broker.keys.state, "accepted", 1)
    where = ("--redis-url", broker.url, "--run", broker.keys.run)
    done = await asyncio.to_thread(commands.lachesis, "dead", "requeue", "--all", *where)
    assert done.returncode == 1
    bad, good, odd = done.stdout.splitlines()
    assert bad == "bad: not requeued: it can't be trained: scores[0] = nan: must be finite"
    assert good == "good: requeued"
    assert odd.startswith("odd: not requeued: it can't be trained: body")
    assert [entry.gid for _, entry in await broker.queue.queued()] == ["good"]
    assert (await audit(broker)).findings == []


@pytest.mark.parametrize("gid", HOSTILE_IDS)
async def test_put_refuses_an_id_that_could_not_stand_in_a_key_or_a_list(broker: Broker, gid: str) -> None:
    with pytest.raises(InvalidGroup, match="gid = "):
        await broker.queue.put(gid, group(1), v_min=0, v_max=0)
    assert not await broker.exists()


@pytest.mark.parametrize("bounds", [(-1, 0), (2, 1), (0, 2**53 + 1)])
async def test_put_refuses_versions_that_no_group_can_have(broker: Broker, bounds: tuple[int, int]) -> None:
    with pytest.raises(InvalidGroup, match="must be versions"):
        await broker.queue.put("g", group(1), v_min=bounds[0], v_max=bounds[1])


async def test_a_packed_post_passes_the_same_checks(broker: Broker) -> None:
    """Those of its body; id and versions it gets here."""
    own = {"another-id", "span", "spans", "lists", "sampled", "sampled-rows"}
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        for gid, (make, rule) in SPOILT.items():
            try:
                packed = msgspec.msgpack.decode(make(gid))[3]
            except (msgspec.DecodeError, TypeError):
                continue
            if gid in own or gid.startswith("version"):
                continue
            answer = await client.post("/scored_data", content=packed, headers={"Content-Type": PACKED_TYPE})
            if gid == "bomb":
                assert answer.status_code == 413
                continue
            assert answer.status_code == 422, (gid, answer.text)
            assert rule in answer.json()["detail"][0]["msg"]
    assert (await broker.queue.status()).accepted == 0

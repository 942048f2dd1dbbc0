"""Groups on their way in: compressed, repeated, spoilt, too many."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import os
import signal
import time
from typing import Any

import httpx
import msgspec
import pytest
from trajectories import ENV, TRAINER, group, number_of, serving

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Lineage
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.versions import ServerStatus, WeightsEntry
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio
GZIP = {"Content-Encoding": "gzip", "Content-Type": "application/json"}


async def dead(broker: Broker) -> list[dict[str, str]]:
    entries = await broker.redis.xrange(broker.keys.refused)
    return [{key.decode(): value.decode() for key, value in fields.items()} for _, fields in entries]


async def kept_body(broker: Broker) -> bytes:
    """Of the one refused post."""
    (letter,) = await broker.dead.all()
    return await broker.dead.body(letter)


# -- repeated -----------------------------------------------------------------------------------------------------


async def test_the_same_post_in_other_gzip_bytes_is_stored_once(registered: httpx.AsyncClient) -> None:
    body = json.dumps(group(1)).encode()
    for compressed, status in ((gzip.compress(body, 1, mtime=0), "received"), (gzip.compress(body, 9), "duplicate")):
        answer = await registered.post("/scored_data", content=compressed, headers=GZIP)
        assert answer.json()["status"] == status
    assert (await registered.post("/scored_data", content=body)).json()["status"] == "duplicate"
    assert (await registered.get("/status")).json()["queue_size"] == 1


async def test_a_client_may_say_what_is_the_same_post(registered: httpx.AsyncClient) -> None:
    for number, key, status in ((1, "a", "received"), (1, "a", "duplicate"), (1, "b", "received")):
        answer = await registered.post("/scored_data", json=group(number), headers={"Idempotency-Key": key})
        assert answer.json()["status"] == status
    assert (await registered.get("/status")).json()["queue_size"] == 2


@pytest.mark.parametrize("path", ["/scored_data", "/scored_data_list"])
async def test_a_known_idempotency_key_with_another_body_is_refused(
    registered: httpx.AsyncClient, broker: Broker, path: str
) -> None:
    def body(number: int) -> Any:
        return [group(number)] if path.endswith("list") else group(number)

    async def post(number: int) -> httpx.Response:
        return await registered.post(path, json=body(number), headers={"Idempotency-Key": "static"})

    assert (await post(1)).json()["status"] == "received"
    for aged in (False, True):
        if aged:
            (entry,) = [entry for _, entry in await broker.queue.queued()]
            assert await broker.redis.delete(broker.keys.seen(entry.gid))
        assert (await post(1)).json()["status"] == "duplicate"
        answer = await post(2)
        assert answer.status_code == 422
        (detail,) = answer.json()["detail"]
        assert detail["loc"] == ["header", "Idempotency-Key"]
        assert detail["msg"] == (
            "Idempotency-Key = 'static': was used for another body; use a new key for each post, and the same one to repeat it"
        )
    assert (await registered.get("/status")).json()["queue_size"] == 1


@pytest.mark.parametrize("first", ["/scored_data", "/scored_data_list"])
async def test_a_key_of_one_route_is_not_taken_on_the_other(registered: httpx.AsyncClient, first: str) -> None:
    second = "/scored_data_list" if first == "/scored_data" else "/scored_data"
    bodies = {"/scored_data": group(1), "/scored_data_list": [group(1)]}
    key = {"Idempotency-Key": "static"}
    for status in ("received", "duplicate"):
        assert (await registered.post(first, json=bodies[first], headers=key)).json()["status"] == status
        refused = await registered.post(second, json=bodies[second], headers=key)
        assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["header", "Idempotency-Key"])
    assert (await registered.get("/status")).json()["queue_size"] == 1


async def test_a_repeat_is_told_and_counted_by_environment(registered: httpx.AsyncClient, broker: Broker) -> None:
    for _ in range(2):
        await registered.post("/register-env", json=ENV)
    for env_id in (0, 1, 1):
        answers = [(await registered.post("/scored_data", json=group(env_id, env_id=env_id))).json() for _ in range(2)]
    assert answers[-1] == {
        "status": "duplicate",
        "detail": "not stored again: this body was accepted within the last 900 s (duplicate_window_s), or its group is not "
        "trained yet; to have equal groups trained, give each post an Idempotency-Key of its own",
    }
    assert (await registered.get("/healthz")).json()["duplicates"] == {"0": 1, "1": 3}
    assert (await broker.queue.status()).duplicates == {"0": 1, "1": 3}


@pytest.mark.parametrize("window_s", [0, 1])
async def test_each_epoch_is_trained_as_soon_as_the_window_lets_it(broker: Broker, window_s: int) -> None:
    app = build_app(broker, ShimSettings(duplicate_window_s=window_s))
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/register", json=TRAINER)
        for _ in range(3):
            assert [(await client.post("/scored_data", json=group(number))).json()["status"] for number in (1, 2, 2)] == [
                "received", "received", "duplicate"
            ]  # fmt: skip
            assert [number_of(item) for item in (await client.get("/batch")).json()["batch"]] == [1, 2]
            assert (await client.get("/batch")).json() == {"batch": None}  # acknowledges
            for key in await broker.redis.keys(broker.keys.seen("*")):
                await broker.redis.delete(key)  # as its time to live does
    report = await audit(broker)
    assert (report.findings, report.trained) == ([], 6)


async def test_equal_groups_of_one_list_are_different_and_a_repeated_list_is_not(registered: httpx.AsyncClient) -> None:
    for _ in range(2):
        answer = await registered.post("/scored_data_list", json=[group(1), group(1), group(2)])
        assert answer.json()["groups_processed"] == 3
    assert (answer.json()["status"], answer.json()["duplicates"]) == ("duplicate", 3)
    assert (await registered.get("/status")).json()["queue_size"] == 3
    empty = await registered.post("/scored_data_list", json=[])
    assert empty.json() == {"status": "received", "groups_processed": 0}


# -- odd sizes ----------------------------------------------------------------------------------------------------


async def test_groups_of_odd_sizes_are_called_buffered_and_wait_in_the_open(registered: httpx.AsyncClient) -> None:
    await registered.post("/register-env", json={**ENV, "group_size": 3})

    async def post(number: int, size: int, **more: Any) -> Any:
        return (await registered.post("/scored_data", json=group(number, size, **more))).json()

    assert await post(1, 3, env_id=0) == {"status": "received"}
    assert await post(2, 2, env_id=0) == {"status": "buffered", "buffer_size": 2}
    assert (await post(2, 2, env_id=0))["status"] == "duplicate"
    for other in (None, 1, -1):
        assert await post(3, 2, env_id=other) == {"status": "received"}
    assert await post(4, 1, env_id=0) == {"status": "buffered", "buffer_size": 0}
    odd = [group(5, 1, env_id=0), group(6, 3, env_id=0), group(7, 2, env_id=1), group(8, 1, env_id=0)]
    answer = (await registered.post("/scored_data_list", json=odd)).json()
    assert answer == {"status": "received", "groups_processed": 4, "buffered": 2, "last_buffer_size": 2}
    for numbers in ([2, 3], [3, 3], [1, 4], [5, 6]):
        batch = (await registered.get("/batch")).json()["batch"]
        assert [number_of(item) for item in batch] == numbers


# -- compressed ---------------------------------------------------------------------------------------------------


async def test_broken_gzip_is_refused(registered: httpx.AsyncClient) -> None:
    whole = gzip.compress(json.dumps(group(1, length=60)).encode())
    for broken in (whole[:-9], whole[: len(whole) // 2], b"not gzip", whole + b"rest"):
        response = await registered.post("/scored_data", content=broken, headers=GZIP)
        assert (response.status_code, response.text) == (400, "Invalid gzip payload")
    half = len(json.dumps(group(1))) // 2
    body = json.dumps(group(1)).encode()
    members = gzip.compress(body[:half]) + gzip.compress(body[half:]) + b"\0\0"
    assert (await registered.post("/scored_data", content=members, headers=GZIP)).status_code == 200


async def test_bodies_are_bounded_before_and_after_decompression(broker: Broker) -> None:
    settings = ShimSettings(max_body_bytes=10_000)
    async with serving(build_app(broker, settings)) as url, httpx.AsyncClient(base_url=url) as client:
        bomb = gzip.compress(b" " * 10_000_000)
        assert len(bomb) < 10_000
        for body, headers in ((bomb, GZIP), (b" " * 10_001, {}), (_chunks(b" " * 6000, 2), {})):
            response = await client.post("/scored_data", content=body, headers=headers)
            assert response.status_code == 413
            assert "larger than 10000 bytes" in response.json()["detail"]
        spaced = json.dumps(group(1)).ljust(10_000)
        assert (
            await client.post("/scored_data", content=gzip.compress(spaced.encode()), headers=GZIP)
        ).status_code == 200


async def _chunks(chunk: bytes, count: int) -> Any:
    for _ in range(count):
        yield chunk


# -- spoilt -------------------------------------------------------------------------------------------------------

SPOILT: dict[str, tuple[dict[str, Any], list[object], str]] = {
    "NaN": ({"scores": [0.0, math.nan]}, ["scores", 1], "scores[1] = nan: must be finite"),
    "infinity, deep": ({"overrides": [{}, {"t": -math.inf}]}, ["overrides", 1, "t"], "overrides[1].t = -inf: must be finite"),
    "NaN top-k": ({"distill_logprobs": [[[math.nan]]]}, ["distill_logprobs", 0, 0, 0], "distill_logprobs[0][0][0] = nan: must be finite"),
    "ragged": ({"masks": [[1], [1, 2, 3]]}, ["masks", 0], "masks[0] = '1 values': must be as long as its tokens, 3"),
    "too long": (group(1, length=65), ["tokens", 0], "tokens[0] = '65 tokens': must not exceed the trainer's max_token_len of 64"),
    "too many": (group(1, size=5), ["tokens"], "tokens = '5 sequences': must not exceed the trainer's batch_size of 4"),
    "too big": ({"tokens": [[1, 2, 2**63], [1, 2, 3]]}, ["tokens"], "tokens = 9223372036854775808: must fit a signed 64-bit integer"),
    "too big, deep": ({"images": [10**30]}, ["images"], "images = 'an integer': must fit a signed 64-bit integer"),
    "too deep": ({"overrides": [{"a": json.loads("[" * 300 + "]" * 300)}]}, ["overrides"], "overrides = 'a value': must not be nested deeper than 250 levels"),
    "not Unicode": ({"images": "\ud800"}, ["images"], "images = '\\ud800': must be Unicode text without lone surrogates"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "location", "message"), SPOILT.values(), ids=SPOILT)
async def test_what_cannot_be_trained_is_refused_in_words_and_kept(
    registered: httpx.AsyncClient, broker: Broker, change: dict[str, Any], location: list[object], message: str
) -> None:
    body = json.dumps({**group(1), **change}).encode()
    response = await registered.post("/scored_data", content=body)
    assert response.status_code == 422
    (entry,) = response.json()["detail"]
    assert (entry["loc"], entry["msg"]) == (["body", *location], message)
    (buried,) = await dead(broker)
    assert (buried["reason"], buried["detail"]) == ("invalid", message)
    assert await kept_body(broker) == body
    assert (await registered.get("/status")).json()["queue_size"] == 0


async def test_a_number_too_large_for_a_double_is_infinite(registered: httpx.AsyncClient) -> None:
    body = json.dumps(group(1)).replace("1.0", "1e999")
    response = await registered.post("/scored_data", content=body)
    assert response.json()["detail"][0]["msg"] == "scores[1] = inf: must be finite"


async def test_the_good_groups_of_a_list_are_stored(registered: httpx.AsyncClient, broker: Broker) -> None:
    bad = group(2, scores=[0.0, math.nan])
    answer = (await registered.post("/scored_data_list", content=json.dumps([group(1), bad, group(3)]))).json()
    assert (answer["status"], answer["groups_processed"], answer["refused"]) == ("received", 3, 1)
    assert answer["detail"][0]["loc"] == ["body", 1, "scores", 1]
    batch = (await registered.get("/batch")).json()["batch"]
    assert [number_of(item) for item in batch] == [1, 3]
    kept = json.loads(await kept_body(broker))
    assert kept["tokens"] == bad["tokens"]
    assert math.isnan(kept["scores"][1])

    response = await registered.post("/scored_data_list", content=json.dumps([bad]))
    assert response.status_code == 422


async def test_what_one_trainer_refuses_the_next_may_take(registered: httpx.AsyncClient, broker: Broker) -> None:
    long = group(1, length=65)
    assert (await registered.post("/scored_data", json=long)).status_code == 422
    await registered.get("/reset_data")
    await registered.post("/register", json={**TRAINER, "max_token_len": 65, "batch_size": 2})
    assert (await registered.post("/scored_data", json=long)).status_code == 200
    assert (await registered.get("/batch")).json()["batch"][0]["tokens"] == long["tokens"]


# -- versions -----------------------------------------------------------------------------------------------------


def made(versions: tuple[int, int]) -> Lineage:
    """The lineage of two tokens."""
    first, last = versions
    return Lineage(first, last, ((first, 0, 1), (last, 1, 2)))


async def test_versions_are_joined_from_lineage_or_bounded(registered: httpx.AsyncClient, broker: Broker) -> None:
    async def spans() -> list[tuple[int, int]]:
        return [(entry.v_min, entry.v_max) for _, entry in await broker.queue.queued()]

    await registered.post("/scored_data", json=group(1))
    for version in (3, 7):
        await broker.weights.publish("main", WeightsEntry(version, version, "file:///v", "0", 1, "BF16", version - 1))
    await registered.post("/scored_data", json=group(2))
    assert await spans() == [(0, 0), (7, 7)]

    now = time.time()
    for name, version in (("a", 7), ("b", 5), ("new", -1)):
        await broker.registry.report(ServerStatus(name, "main", "http://s", "ready", version, -1, now))
    gone = ServerStatus("gone", "main", "http://s", "ready", 1, -1, now - 3600)  # reported then
    await broker.redis.hset(broker.keys.pools, "gone", msgspec.json.encode(gone))
    await registered.post("/scored_data", json=group(3))
    first, second = group(4)["tokens"]
    await broker.lineage.record([(tokens_digest(first), made((2, 4))), (tokens_digest(second), made((3, 6)))])
    await registered.post("/scored_data", json=group(4))
    await broker.lineage.record([(tokens_digest(group(5)["tokens"][0]), made((6, 6)))])
    await registered.post("/scored_data", json=group(5))
    assert (await spans())[2:] == [(5, 7), (2, 6), (5, 7)]
    assert (await registered.get("/healthz")).json()["lineage"] == {
        "joined": 3, "unknown": 7, "mismatched": 0, "sent": 0,
    }  # fmt: skip


async def test_while_nobody_serves_the_run_is_asked_once_and_still_believed_only_while_it_is_true(
    registered: httpx.AsyncClient, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, arrive = [], broker.scripts.read_arrival

    async def counted(**of: Any) -> Any:
        asked.append(of)
        return await arrive(**of)

    async def post(number: int, **of: Any) -> tuple[int, int]:
        before = len(asked)
        response = await registered.post("/scored_data", json=group(number, **of))
        return response.status_code, len(asked) - before

    monkeypatch.setattr(broker.scripts, "read_arrival", counted)
    assert [await post(number) for number in (1, 2, 3)] == [(200, 1), (200, 0), (200, 0)]
    await broker.registry.register_trainer(TrainerConfig(**{**TRAINER, "max_token_len": 8}))
    assert await post(4) == (200, 1)
    assert await post(5, length=9) == (422, 1)
    await broker.registry.register_trainer(TrainerConfig(**{**TRAINER, "max_token_len": 9}))
    assert await post(6, length=9) == (200, 1)
    await broker.weights.publish("main", WeightsEntry(7, 7, "file:///v", "0", 1, "BF16", 6))
    assert [await post(number) for number in (7, 8)] == [(200, 1), (200, 0)]
    await broker.lineage.record([("a digest", made((7, 7)))])
    assert [await post(number) for number in (9, 10)] == [(200, 1), (200, 1)]
    newest = [entry.v_max for _, entry in await broker.queue.queued()]
    assert newest == [0, 0, 0, 0, 0, 7, 7, 7, 7]


# -- too many -----------------------------------------------------------------------------------------------------


async def test_posts_over_the_quota_wait_until_a_batch_is_taken(broker: Broker) -> None:
    settings = ShimSettings(queue_quota_bytes=1)
    async with serving(build_app(broker, settings)) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/register", json={**TRAINER, "batch_size": 2})
        await client.post("/scored_data", json=group(1))
        held = [asyncio.create_task(client.post("/scored_data", json=group(number))) for number in (2, 3)]
        done, _ = await asyncio.wait(held, timeout=0.7)
        assert not done
        assert (await client.get("/status")).json()["queue_size"] == 1
        for queued in (1, 0):
            assert len((await client.get("/batch")).json()["batch"]) == 1
            answered, held_still = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED, timeout=5)
            assert [task.result().json() for task in answered] == [{"status": "received"}]
            assert len(held_still) == queued
            held = list(held_still)


async def test_only_a_long_wait_ends_in_503(broker: Broker) -> None:
    app = build_app(broker, ShimSettings(queue_quota_bytes=1), hold_s=0.3)
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/scored_data", json=group(1))
        response = await client.post("/scored_data", json=group(2))
    assert (response.status_code, response.headers["retry-after"]) == (503, "10")
    assert "over its quota" in response.json()["detail"]


async def test_a_full_redis_holds_posts_and_still_hands_out_batches(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/register", json={**TRAINER, "batch_size": 2})
        await client.get("/batch")
        for number in range(2):
            await client.post("/scored_data", json=group(number))
        await broker.redis.config_set("maxmemory", "1mb")
        held = asyncio.create_task(client.post("/scored_data", json=group(9)))
        for number in range(2):
            assert [number_of(item) for item in (await client.get("/batch")).json()["batch"]] == [number]
        assert (await client.get("/batch")).json() == {"batch": None}
        assert [entry.step async for entry in broker.queue.ledger("main")] == [1, 2]
        assert not held.done()
        await broker.redis.config_set("maxmemory", "0")
        assert (await held).json() == {"status": "received"}
    await broker.aclose()


async def test_a_restart_of_redis_is_a_pause(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    await broker.redis.config_set("appendfsync", "always")  # docs/guarantees.md: what the death of Redis itself leaves
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        await client.post("/scored_data", json=group(1))
        assert redis_server.pid is not None
        os.kill(redis_server.pid, signal.SIGKILL)
        redis_server.stop()
        waiting = asyncio.create_task(client.post("/scored_data", json=group(2)))
        response = await client.get("/healthz")
        assert (response.status_code, response.json()["status"]) == (503, "no redis")
        assert not waiting.done()
        redis_server.start()
        assert (await waiting).json() == {"status": "received"}
        assert (await client.get("/status")).json()["queue_size"] == 2
        assert (await client.get("/healthz")).status_code == 200
    await broker.aclose()

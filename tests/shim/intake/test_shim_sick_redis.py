"""A Redis that refuses, or was demoted, is pressure: posts wait, nobody is told 500, and `/healthz` says what it is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sick_redis import SickRedis, pair, sick_redis, until
from trajectories import ENV, TRAINER, group, serving

from lachesis.broker import Broker, client
from lachesis.broker.audit import audit
from lachesis.broker.records.keys import RUNS
from lachesis.broker.store import connection
from lachesis.service.http.access import ADMIN, Access
from lachesis.shim.app import build_app
from lachesis.shim.intake import backpressure
from lachesis.shim.routes import status
from lachesis.shim.settings import ShimSettings

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PASSES = ("NOREPLICAS", "MISCONF", "BUSY", "READONLY", "MASTERDOWN", "OOM", "NOPERM", "LOADING", "CLUSTERDOWN")


class Sick:
    """A shim with a trainer and an environment, and its Redis."""

    def __init__(self, client: httpx.AsyncClient, broker: Broker, sick: SickRedis) -> None:
        self.client, self.broker, self.make = client, broker, sick

    async def post(self, number: int, **more: Any) -> httpx.Response:
        return await self.client.post("/scored_data", json=group(number, env_id=0, **more))

    async def health(self) -> httpx.Response:
        return await self.client.get("/healthz")

    async def is_sick(self) -> bool:
        return (await self.health()).status_code == 503

    async def refused(self, command: str) -> int:
        """How often Redis refused it so far."""
        stats = await self.broker.redis.info("commandstats")
        return int(stats.get(f"cmdstat_{command}", {}).get("rejected_calls", 0))

    async def asked(self, times: int) -> bool:
        """Whether held posts have asked so often whether writes are taken."""
        return await self.refused("setrange") >= times

    async def status(self) -> httpx.Response:
        return await self.client.request("GET", "/status-env", json={"env_id": 0})


@pytest.fixture
async def sick(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sick]:
    """With the server in which the parameter `code` of the test can happen."""
    code = request.node.callspec.params.get("code", "") if hasattr(request.node, "callspec") else ""
    monkeypatch.setattr(status, "STATUS_PATIENCE_S", 0.05)
    async with sick_redis(tmp_path, user=code == "NOPERM", cluster=code == "CLUSTERDOWN") as (url, make):
        broker = await Broker.connect(url)
        app = build_app(broker, ShimSettings())
        async with serving(app) as base, httpx.AsyncClient(base_url=base, timeout=60) as client:
            shim = Sick(client, broker, make)
            for path, body in (("/register", TRAINER), ("/register-env", ENV)):
                assert (await client.post(path, json=body)).status_code == 200
            assert (await client.get("/batch")).json() == {"batch": None}
            assert (await shim.post(1)).status_code == 200
            assert (await shim.status()).status_code == 200
            yield shim
        await broker.aclose()


@pytest.mark.parametrize("code", PASSES)
async def test_posts_wait_and_healthz_says_why(sick: Sick, code: str) -> None:
    async with sick.make(code):
        await until(sick.is_sick)
        held = asyncio.create_task(sick.post(2))
        answer = await sick.status()  # needs no write, and is known
        assert (answer.status_code, answer.json()["queue_size"]) == (200, 1)
        health = await sick.health()
        assert (health.status_code, health.json()["status"].split()[0]) == (503, "redis")
        assert health.json()["reason"].startswith("Redis ")
        assert not held.done()
    assert (await held).json() == {"status": "received"}
    assert (await sick.health()).status_code == 200
    assert len((await sick.client.get("/batch")).json()["batch"]) == 2
    assert (await audit(sick.broker)).findings == []


@pytest.mark.parametrize("code", [code for code in PASSES if code not in ("OOM", "NOPERM")])
async def test_other_calls_wait_a_while(sick: Sick, code: str) -> None:
    async with sick.make(code):
        calls = [
            asyncio.create_task(sick.client.request(method, path, json=body))
            for method, path, body in (("POST", "/register-env", ENV), ("POST", "/register", TRAINER), ("GET", "/batch", None))
        ]  # fmt: skip
        await until(sick.is_sick)
    assert [(await call).status_code for call in calls] == [200] * 3


@pytest.mark.parametrize("code", PASSES)
async def test_nothing_but_503_with_retry_after_in_the_end(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE_S", 0.1)
    calls = [
        ("POST", "/register", TRAINER), ("POST", "/register-env", ENV), ("GET", "/batch", None), ("GET", "/status", None),
        ("POST", "/scored_data", group(1, env_id=0)), ("POST", "/scored_data_list", [group(2)]), ("GET", "/info", None),
        ("POST", "/disconnect-env", {"env_id": 0}), ("GET", "/status-env", {"env_id": 0}), ("GET", "/latest_example", None),
    ]  # fmt: skip
    async with sick_redis(tmp_path, user=code == "NOPERM", cluster=code == "CLUSTERDOWN") as (url, make):
        broker = await Broker.connect(url)
        async with (
            serving(build_app(broker, ShimSettings(), hold_s=0.1)) as base,
            httpx.AsyncClient(base_url=base, timeout=60) as client,
        ):
            assert [
                (await client.request(method, path, json=body)).status_code for method, path, body in calls[:4]
            ] == [200] * 4
            async with make(code):
                answers = [await client.request(method, path, json=body) for method, path, body in calls]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert {answer.status_code for answer in refused} == {503}
        assert all(
            "retry-after" in answer.headers and answer.json()["detail"].startswith("Redis ") for answer in refused
        )
        assert all(answer in refused for answer in answers[4:6])
        await broker.aclose()


async def test_a_failover_behind_an_address_is_a_pause(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        broker = await Broker.connect(both.url)
        async with (
            serving(build_app(broker, ShimSettings())) as base,
            httpx.AsyncClient(base_url=base, timeout=60) as client,
        ):
            await client.post("/register", json=TRAINER)
            await client.get("/batch")
            await client.post("/register-env", json=ENV)
            over, codes, waits, posted = asyncio.Event(), set(), [0.0], 0

            async def environment(env: int) -> None:
                nonlocal posted
                while not over.is_set():
                    began, posted = time.monotonic(), posted + 1
                    answer = await client.post("/scored_data", json=group(posted, env_id=env))
                    waits.append(time.monotonic() - began)
                    codes.add(answer.status_code)
                    for method, path, body in (("GET", "/status-env", {"env_id": env}), ("GET", "/batch", None)):
                        codes.add((await client.request(method, path, json=body)).status_code)

            async with asyncio.TaskGroup() as tasks:
                environments = [tasks.create_task(environment(env)) for env in range(4)]
                await until(lambda: _reached(broker, 20))
                await both.demote()
                both.switch()
                await until(lambda: _reached(broker, 60))
                over.set()
            assert all(task.done() for task in environments)
            assert codes == {200}
            assert int(await both.clients[1].hget(broker.keys.state, "accepted") or 0) == posted
            print(f"longest post {max(waits):.2f} s")
        assert (await audit(broker)).findings == []
        await broker.aclose()


async def _reached(broker: Broker, accepted: int) -> bool:
    return (await broker.queue.status()).accepted >= accepted


async def test_posts_that_wait_share_one_question(sick: Sick, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a refusing Redis is asked does not grow with the posts that wait, and no group is sent to it again and again."""
    posts = 30
    monkeypatch.setattr(client, "ASK_S", 0.1)  # three or four questions
    monkeypatch.setattr(backpressure, "QUICK_S", 0.1)

    async with sick.make("NOREPLICAS"):
        held = [asyncio.create_task(sick.post(number)) for number in range(100, 100 + posts)]
        await until(lambda: sick.asked(20))
        sent = await sick.refused("set")
        await until(lambda: sick.asked(26))
        assert await sick.refused("set") == sent
    assert {(await post).status_code for post in held} == {200}


async def test_posts_that_come_meanwhile_wait_with_their_body(sick: Sick) -> None:
    """It stays where it is: the server does not ask for it."""
    url, body = sick.client.base_url, json.dumps(group(3)).encode()
    head = (
        f"POST /scored_data HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    async with sick.make("NOREPLICAS"):
        first = asyncio.create_task(sick.post(2))

        await until(lambda: sick.asked(12))  # so often within two looks: it is known by then
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head.encode())
        asked_for = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        assert not (await asyncio.wait([asked_for], timeout=0.5))[0]
    assert (await asked_for).startswith(b"HTTP/1.1 100 ")
    writer.write(body)
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()
    assert (await first).status_code == 200


async def test_a_stored_group_is_answered_as_stored(sick: Sick) -> None:
    """Whatever fails after PUT: here the user may not note that the environment called, nor look it up."""
    redis = sick.broker.redis
    await redis.execute_command(
        "ACL", "SETUSER", "shim", "resetkeys", *(f"~{key}" for key in _all_but_envs(sick.broker))
    )
    url = sick.broker.url.replace("unix://", "unix://shim:pw@")
    broker = await Broker.connect(url)
    async with serving(build_app(broker, ShimSettings())) as base, httpx.AsyncClient(base_url=base) as client:
        answer = await client.post("/scored_data", json=group(2, size=3, env_id=0))
    assert (answer.status_code, answer.json()) == (200, {"status": "received"})
    assert (await sick.broker.queue.status()).groups == 2
    await broker.aclose()


def _all_but_envs(broker: Broker) -> list[str]:
    prefix = broker.keys.groups.removesuffix("groups")
    names = ["groups", "blob:*", "seen:*", "state", "trainers", "trained", "weights:*", "pools", "served", "lineage*"]
    names += ["batches", "tokens"]
    return [RUNS, *(prefix + name for name in names)]


async def test_a_mistake_of_ours_is_no_trouble_of_redis(sick: Sick) -> None:
    await sick.broker.redis.delete(sick.broker.keys.trainers)
    await sick.broker.redis.set(sick.broker.keys.trainers, "not a hash")
    assert (await sick.client.get("/info")).status_code == 500


async def test_a_refused_post_is_told_so_while_nothing_can_be_kept(sick: Sick) -> None:
    async with sick.make("OOM"):
        answer = await sick.client.post(
            "/scored_data", json=group(3) | {"scores": [float("inf"), 0.0]} | {"scores": []}
        )
    assert answer.status_code == 422


async def test_tokens_known_count_on_while_redis_is_in_trouble(sick: Sick, monkeypatch: pytest.MonkeyPatch) -> None:
    token, _ = await sick.broker.tokens.create("admin")
    access = Access(sick.broker, required=False)
    await access.check(f"Bearer {token}", ADMIN)
    monkeypatch.setattr("lachesis.service.http.access.TOKENS_FRESH_S", 0.0)
    monkeypatch.setattr("lachesis.service.http.access.TOKENS_PATIENCE_S", 0.0)
    async with sick.make("BUSY"):
        await access.check(f"Bearer {token}", ADMIN)
        with pytest.raises(PermissionError, match="unknown or revoked"):
            await access.check("Bearer wrong", ADMIN)

"""Tokens: who may call which route, how a token is handed over, and that it is never told to anyone else."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import anyio.to_thread
import httpx
import pytest
import requests
from trajectories import ENV, TRAINER, group, serving, shim_process, wait_until_up, with_token

from lachesis.broker import Broker, EmbeddedRedis, connect_blocking
from lachesis.broker.records.registrations import Role
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ROLES: tuple[Role, ...] = ("environment", "trainer", "admin")
ALL: set[str] = set(ROLES)
ROUTES: dict[tuple[str, str], tuple[Any, set[str]]] = {
    ("GET", "/"): (None, ALL),
    ("GET", "/info"): (None, ALL),
    ("GET", "/wandb_info"): (None, ALL),
    ("GET", "/status"): (None, ALL),
    ("GET", "/latest_example"): (None, ALL),
    ("POST", "/register"): (TRAINER, {"trainer", "admin"}),
    ("GET", "/batch"): (None, {"trainer", "admin"}),
    ("POST", "/register-env"): (ENV, {"environment", "admin"}),
    ("GET", "/status-env"): ({"env_id": 0}, {"environment", "admin"}),
    ("POST", "/scored_data"): (group(1), {"environment", "admin"}),
    ("POST", "/scored_data_list"): ([group(2)], {"environment", "admin"}),
    ("POST", "/disconnect-env"): ({"env_id": 0}, {"environment", "admin"}),
    ("GET", "/reset_data"): (None, {"admin"}),
    ("GET", "/runs"): (None, {"admin"}),
}


@pytest.fixture
async def tokens(broker: Broker) -> dict[str, str]:
    """A token of each role, for the test's run."""
    return {role: (await broker.tokens.create(role, f"the-{role}"))[0] for role in ROLES}


@pytest.fixture
async def url(broker: Broker, tokens: dict[str, str]) -> AsyncIterator[str]:
    async with serving(build_app(broker, ShimSettings())) as url:
        yield url


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def until(client: httpx.AsyncClient, path: str, code: int) -> None:
    """Return when `GET path` is answered with `code`, as it is when what the shim remembers of tokens has aged."""
    with anyio.fail_after(20):
        while (await client.get(path)).status_code != code:  # noqa: ASYNC110  (what it waits for happens elsewhere)
            await anyio.sleep(0.2)


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_may_do_its_part_and_no_more(
    url: str, tokens: dict[str, str], role: str, broker: Broker
) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        for (method, path), (body, roles) in ROUTES.items():
            paths = [path] if path == "/runs" else [path, f"/runs/{broker.keys.run}{path}"]
            for full in paths:
                answer = await client.request(method, full, json=body, headers=bearer(tokens[role]))
                assert answer.status_code == (200 if role in roles else 403), (path, answer.text)
                if role not in roles:
                    needed = " or ".join(name for name in ROLES if name in roles)
                    assert answer.json() == {
                        "detail": f"this takes the role {needed}; the token 'the-{role}' has {role}"
                    }


async def test_without_a_token_only_health_is_told(url: str, broker: Broker) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        for (method, path), (body, _) in ROUTES.items():
            for header in ("", "Bearer", "Bearer lachesis_guess", "Basic !", "x"):
                headers = {"Authorization": header} if header else {}
                answer = await client.request(method, path, json=body, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == 'Bearer realm="lachesis"'
                assert f"lachesis token create --run {broker.keys.run} --role ROLE" in answer.json()["detail"]
        health = await client.get("/healthz")
        assert (health.status_code, health.json()) == (200, {"status": "ok"})
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.post("/batch")).status_code == 405
    assert (await broker.queue.status()).accepted == 0
    assert await broker.registry.trainer_config() is None


async def test_a_token_of_one_run_is_nothing_in_another(url: str, tokens: dict[str, str], broker: Broker) -> None:
    other = broker.for_run(f"{broker.keys.run}-b")
    async with httpx.AsyncClient(base_url=url, headers=bearer(tokens["admin"])) as client:
        assert (await client.get(f"/runs/{other.keys.run}/status")).status_code == 200  # that one is open
        theirs, _ = await other.tokens.create("admin")
        assert (await client.get("/status", headers=bearer(theirs))).status_code == 401
        assert (await client.get(f"/runs/{other.keys.run}/status", headers=bearer(theirs))).status_code == 200
        await until(client, f"/runs/{other.keys.run}/status", 401)


async def test_a_new_token_works_at_once_and_a_revoked_one_soon_no_more(url: str, broker: Broker) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/status")).status_code == 401
        token, record = await broker.tokens.create("environment")
        assert (await client.get("/status", headers=bearer(token))).status_code == 200
        await broker.tokens.revoke(record.name)
        client.headers.update(bearer(token))
        await until(client, "/status", 401)
        for known in await broker.tokens.all():
            await broker.tokens.revoke(known.name)
        answer = await client.get("/status")
        assert answer.status_code == 401  # not open again
        assert "this token is unknown or revoked" in answer.json()["detail"]


async def test_require_tokens_closes_runs_that_have_none(broker: Broker) -> None:
    app = build_app(broker, ShimSettings(require_tokens=True))
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/status", "/runs/anything/status", "/runs"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/runs/anything/healthz")).status_code == 200
        token, _ = await broker.tokens.create("trainer")
        assert (await client.get("/status", headers=bearer(token))).status_code == 200


async def test_clients_that_know_only_a_url(url: str, tokens: dict[str, str], run_name: str) -> None:
    """aiohttp is what Atropos environments use, requests what its trainers use."""
    for base in (url, f"{url}/runs/{run_name}"):
        environment, trainer = (with_token(base, tokens[role]) for role in ("environment", "trainer"))
        register = await anyio.to_thread.run_sync(partial(requests.post, f"{trainer}/register", json=TRAINER))
        assert register.status_code == 200
        assert (await anyio.to_thread.run_sync(requests.get, f"{trainer}/batch")).json() == {"batch": None}
        assert (await anyio.to_thread.run_sync(requests.get, f"{trainer}/reset_data")).status_code == 403
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{environment}/register-env", json=ENV) as answer:
                assert (await answer.json())["status"] == "success"
            async with session.get(f"{environment}/status-env", json={"env_id": 0}) as answer:
                assert answer.status == 200
            async with session.get(f"{environment}/batch") as answer:
                assert answer.status == 403
            async with session.get(f"{with_token(base, 'wrong')}/status") as answer:
                assert answer.status == 401
            for user in ("", "alice"):
                async with session.get(f"{with_token(base, tokens['admin'], user)}/status") as answer:
                    assert answer.status == 200


async def test_schemes_in_any_case(url: str, tokens: dict[str, str]) -> None:
    basic = base64.b64encode(f"x:{tokens['admin']}".encode()).decode()
    async with httpx.AsyncClient(base_url=url) as client:
        for header in (f"bearer {tokens['admin']}", f"BEARER  {tokens['admin']}", f"basic {basic}"):
            assert (await client.get("/status", headers={"Authorization": header})).status_code == 200
        for header in (tokens["admin"], f"Token {tokens['admin']}", f"Basic {tokens['admin']}", "Basic", "Bearer é"):
            answer = await client.get("/status", headers={b"Authorization": header.encode("latin-1")})
            assert answer.status_code == 401


async def test_a_refused_body_is_not_read_into_memory_and_the_connection_goes_on(
    url: str, tokens: dict[str, str]
) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    size = 32 << 20
    writer.write(f"POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 401")  # before any of it was sent
    writer.close()
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/scored_data", content=b" " * (4 << 20))
        assert answer.status_code == 401
        answer = await client.post("/scored_data", json=group(1), headers=bearer(tokens["environment"]))
        assert answer.json() == {"status": "received"}


def test_tokens_are_in_no_log_and_no_answer(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with connect_blocking(shared_redis.url, run_name) as blocking:
        tokens = {role: blocking.call(blocking.broker.tokens.create, role)[0] for role in ROLES}
    with shim_process(log, "--redis-url", shared_redis.url, "--run", run_name, "--port", "0") as shim:
        while "http://" not in (text := log.read_text()):
            assert shim.poll() is None, text
            time.sleep(0.05)
        url = next(word for word in text.split() if "http://" in word).partition("=")[2]
        wait_until_up(f"{url}/healthz", shim, log)
        answers = [
            requests.request(method, f"{with_token(url, token)}{path}", json=body, timeout=10).text
            for token in (*tokens.values(), "lachesis_wrong")
            for (method, path), (body, _) in ROUTES.items()
        ]
        answers.append(requests.get(f"{url}/status?token={tokens['admin']}", timeout=10).text)
        shim.terminate()
        shim.wait(15)
    secrets = [*tokens.values(), "lachesis_wrong"]
    assert not [secret for secret in secrets if secret in log.read_text()]
    assert not [secret for secret in secrets if secret in "".join(answers)]

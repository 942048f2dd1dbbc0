"""Every route by every token, and what a token of one environment or trainer can do to the others of its run."""

from __future__ import annotations

import itertools
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from doors import REQUEST, Upstream, answers, door
from starlette.applications import Starlette
from trajectories import ENV, TRAINER, group, number_of, serving, shim_process, wait_until_up

from lachesis.broker import Broker, ConfigurationError, EmbeddedRedis, connect_blocking
from lachesis.broker.records.registrations import Role
from lachesis.inference.gateway import app as front_door
from lachesis.inference.settings import FrontDoorSettings
from lachesis.service.http import access
from lachesis.service.http.settings import CallerSettings, is_loopback
from lachesis.shim import main
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio

ROLES: tuple[Role, ...] = ("environment", "trainer", "admin")
TO_EVERYONE = {"/healthz", "/openapi.json"}
PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
ROWS = re.findall(r"^\| (every role|environment|trainer|admin|nobody in particular) \| (.*) \|$", PAGE, re.M)
MINE, THEIRS, NOBODYS = 0, 1, 77  # environments: registered with the token alice, with bob, with none
NAMES_ITS_ENVIRONMENT = ("/status-env", "/disconnect-env", "/scored_data", "/scored_data_list")

numbers = itertools.count(1000)


def documented() -> dict[str, set[str]]:
    """Which role may call which path, as docs/security.md has it."""
    calls = {role: set(re.findall(r"`(?:GET )?(/[\w.-]*)`", cell)) for role, cell in ROWS}
    every = calls["every role"]
    known = {role: every | calls[role] for role in ("environment", "trainer")}
    admin = set().union(*known.values()) | calls["admin"]
    return {**known, "admin": admin, "": calls["nobody in particular"]}


def table(app: Starlette, run: str) -> list[tuple[str, str]]:
    """Method and path of each route that is served; what ends a run comes last."""
    (mount,) = app.routes
    routes = mount.app._served[run].app.routes  # type: ignore[attr-defined]
    found = [(method, route.path) for route in routes for method in route.methods]
    return sorted(found, key=lambda route: route[1] == "/reset_data")


def body_of(path: str, env_id: int | None) -> Any:
    number = next(numbers)
    return {
        "/register": TRAINER, "/register-env": ENV,
        "/status-env": {"env_id": env_id}, "/disconnect-env": {"env_id": env_id},
        "/scored_data": group(number, env_id=env_id), "/scored_data_list": [group(number, env_id=env_id)],
    }.get(path)  # fmt: skip


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


@pytest.fixture
async def tokens(broker: Broker) -> dict[str, str]:
    """Of alice and bob in each role; the same of another run; one that is revoked, one that nobody made, and none."""
    other = broker.for_run(f"{broker.keys.run}-b")
    made = {"nobody": "", "a guess": "lachesis_guess"}
    for role in ROLES:
        for who in ("alice", "bob"):
            made[f"{who} {role}"], _ = await broker.tokens.create(role, f"{who}-{role}")
        made[f"stranger {role}"], _ = await other.tokens.create(role, f"alice-{role}")
    made["revoked admin"], record = await broker.tokens.create("admin")
    await broker.tokens.revoke(record.name)
    return made


@pytest.fixture
async def client(broker: Broker, tokens: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """Of a shim where a trainer has started, and alice and bob registered an environment each."""
    app = build_app(broker, ShimSettings(env_quota_sequences=4), hold_s=0.3)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        await start(client, tokens)
        yield client


async def start(client: httpx.AsyncClient, tokens: dict[str, str]) -> None:
    admin = bearer(tokens["alice admin"])
    assert (await client.post("/register", json=TRAINER, headers=admin)).status_code == 200
    assert (await client.get("/batch", headers=admin)).status_code == 200
    for env_id, who in ((MINE, "alice"), (THEIRS, "bob")):
        answer = await client.post("/register-env", json=ENV, headers=bearer(tokens[f"{who} environment"]))
        assert answer.json()["env_id"] == env_id


def expected(path: str, who: str, env_id: int | None) -> int:
    role = who.partition(" ")[2]
    if path in documented()[""]:
        return 200
    if who not in ("nobody", "a guess") and role in ROLES and who.startswith(("alice", "bob")):
        if path not in documented()[role]:
            return 403
        owner = {MINE: "alice", THEIRS: "bob"}.get(-1 if env_id is None else env_id, who.partition(" ")[0])
        return 200 if role == "admin" or path not in NAMES_ITS_ENVIRONMENT or who.startswith(owner) else 403
    return 401


async def test_every_route_by_every_token_on_every_environment(broker: Broker, tokens: dict[str, str]) -> None:
    app = build_app(broker, ShimSettings())
    routes = table(app, broker.keys.run)
    assert {path for _, path in routes} == documented()["admin"] | documented()[""]
    assert documented()[""] == TO_EVERYONE
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        await start(client, tokens)
        for method, path in routes:
            for who, token in tokens.items():
                environments: tuple[int | None, ...] = (MINE,)
                if path in NAMES_ITS_ENVIRONMENT:
                    environments = (MINE, THEIRS, NOBODYS) if path.endswith("-env") else (MINE, THEIRS, NOBODYS, None)
                for env_id in environments:
                    call: dict[str, Any] = {"json": body_of(path, env_id), "headers": bearer(token)}
                    answer = await client.request(method, path, **call)
                    assert answer.status_code == expected(path, who, env_id), (path, who, env_id, answer.text)
                    assert not token or token not in answer.text
                    if path == "/reset_data" and answer.status_code == 200:
                        await start(client, tokens)


async def test_a_list_with_another_ones_group_is_refused_whole(
    client: httpx.AsyncClient, tokens: dict[str, str], broker: Broker
) -> None:
    alice = bearer(tokens["alice environment"])
    groups = [group(1, env_id=MINE), group(2), group(3, env_id=THEIRS)]
    answer = await client.post("/scored_data_list", json=groups, headers=alice)
    assert answer.status_code == 403
    assert answer.json()["detail"].startswith(f"env_id = {THEIRS}: was registered with another token")
    assert (await broker.queue.status()).accepted == 0
    assert (await client.post("/scored_data_list", json=groups[:2], headers=alice)).status_code == 200


async def test_nobody_fills_anothers_quota_or_evades_its_own(client: httpx.AsyncClient, tokens: dict[str, str]) -> None:
    alice, bob = bearer(tokens["alice environment"]), bearer(tokens["bob environment"])

    async def post(number: int, env_id: int | None, headers: dict[str, str]) -> int:
        body = group(number, **({} if env_id is None else {"env_id": env_id}))
        return (await client.post("/scored_data", json=body, headers=headers)).status_code

    assert [await post(n, n * 100, alice) for n in range(3, 6)] == [
        200,
        200,
        503,
    ]  # of 2 sequences each: over the quota
    assert [await post(6, None, alice), await post(7, -1, alice)] == [503, 503]
    assert [await post(8, THEIRS, alice), await post(9, MINE, alice)] == [403, 200]
    assert [await post(10, THEIRS, bob), await post(11, None, bob)] == [200, 200]
    told = (await client.request("GET", "/status-env", json={"env_id": NOBODYS}, headers=alice)).json()
    assert told["self_queue_size"] == 2  # groups of the largest size: its own, whatever id it gives


async def test_another_tokens_environment_is_neither_heard_nor_changed(
    client: httpx.AsyncClient, tokens: dict[str, str], broker: Broker
) -> None:
    before = await broker.redis.zscore(broker.keys.heard, str(THEIRS))
    for path in ("/status-env", "/disconnect-env"):
        method = "GET" if path == "/status-env" else "POST"
        call: dict[str, Any] = {"json": {"env_id": THEIRS}, "headers": bearer(tokens["alice environment"])}
        assert (await client.request(method, path, **call)).status_code == 403
    assert await broker.redis.zscore(broker.keys.heard, str(THEIRS)) == before
    found = await broker.registry.env(THEIRS)
    assert found is not None
    assert (found.connected, found.owner) == (True, "bob-environment")


async def test_what_was_registered_without_a_token_is_anybodys(
    client: httpx.AsyncClient, tokens: dict[str, str], broker: Broker
) -> None:
    record = json.loads(await broker.redis.hget(broker.keys.envs, str(MINE)))
    del record["owner"]  # as releases without it kept it
    await broker.redis.hset(broker.keys.envs, str(MINE), json.dumps(record))
    for who in ("alice", "bob"):
        call: dict[str, Any] = {"json": {"env_id": MINE}, "headers": bearer(tokens[f"{who} environment"])}
        assert (await client.request("GET", "/status-env", **call)).status_code == 200
        assert (await client.post("/disconnect-env", **call)).status_code == 200


async def test_a_key_is_one_for_each_token(client: httpx.AsyncClient, tokens: dict[str, str]) -> None:
    key = {"Idempotency-Key": "1"}
    alice, bob = (bearer(tokens[f"{who} environment"]) | key for who in ("alice", "bob"))
    said = [
        (await client.post("/scored_data", json=group(number), headers=who)).json().get("status")
        for number, who in ((1, alice), (2, bob), (1, alice), (2, bob))
    ]
    assert said == ["received", "received", "duplicate", "duplicate"]
    assert (await client.post("/scored_data", json=group(2), headers=alice)).status_code == 422


@pytest.mark.parametrize("value", [1e15, -0.1, 1.0000001, "nan", "inf"])
async def test_a_minimum_is_a_part_of_the_batch(client: httpx.AsyncClient, tokens: dict[str, str], value: Any) -> None:
    body = {**ENV, "min_batch_allocation": value}
    answer = await client.post("/register-env", json=body, headers=bearer(tokens["alice environment"]))
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"][0]["loc"] == ["body", "min_batch_allocation"]


async def test_a_trainers_token_has_leases_of_its_own(broker: Broker, tokens: dict[str, str]) -> None:
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        admin = bearer(tokens["alice admin"])
        await start(client, tokens)
        for number in range(1, 6):
            await client.post("/scored_data", json=group(number, 4), headers=admin)

        async def batch(who: str, name: str | None = None, path: str = "/batch") -> int:
            headers = bearer(tokens[f"{who} trainer"]) | ({} if name is None else {"X-Trainer-Id": name})
            [found] = (await client.get(path, headers=headers)).json()["batch"]
            return number_of(found)

        async def trained() -> list[tuple[int, str]]:
            return [(entry.step, entry.replica) async for entry in broker.queue.ledger("main")]

        assert [await batch("alice", "left"), await batch("alice", "right")] == [1, 2]  # two replicas with one token
        assert await batch("bob", "left") == 3  # neither alice's batch nor its acknowledgement
        assert await batch("bob", path="/trainers/right/batch") == 4
        assert await trained() == []
        assert await batch("alice", "left") == 5
        assert await trained() == [(1, "http:alice-trainer/left")]


async def test_a_batch_lent_before_there_were_tokens_is_acknowledged(broker: Broker) -> None:
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/register", json=TRAINER)
        for number in (1, 2):
            await client.post("/scored_data", json=group(number, 4))
        name = {"X-Trainer-Id": "left"}
        assert number_of((await client.get("/batch", headers=name)).json()["batch"][0]) == 1
        token, _ = await broker.tokens.create("trainer", "alice")
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        assert number_of((await client.get("/batch", headers=bearer(token) | name)).json()["batch"][0]) == 2
        assert [entry.step async for entry in broker.queue.ledger("main")] == [1]


async def test_an_emptied_or_restored_redis_opens_nothing(
    redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "TOKENS_FRESH_S", 0.0)
    broker = await Broker.connect(redis_server.url)
    good, _ = await broker.tokens.create("admin", "good")
    bad, record = await broker.tokens.create("admin", "bad")
    older = await broker.redis.hgetall(broker.keys.tokens)
    await broker.tokens.revoke(record.name)
    async with (
        serving(build_app(broker, ShimSettings())) as url,
        Upstream(broker, "s", answers).running(),
        door(broker) as generations,
        httpx.AsyncClient(base_url=url) as client,
    ):

        async def codes(token: str) -> list[int]:
            async with generations.post("/generate", json=REQUEST, headers=bearer(token)) as answer:
                return [(await client.get("/status", headers=bearer(token))).status_code, answer.status]

        assert [await codes(good), await codes(bad), await codes("")] == [[200, 200], [401, 401], [401, 401]]
        others = [
            await client.get(f"/runs/r{number}/status") for number in range(300)
        ]  # more than are kept between requests
        assert {answer.status_code for answer in others} == {200}
        await broker.redis.flushall()
        for run in ("default", "r1"):
            assert (await client.get(f"/runs/{run}/status")).status_code == (401 if run == "default" else 200)
        assert [await codes(good), await codes(bad), await codes("")] == [[401, 401]] * 3
        await broker.redis.hset(broker.keys.tokens, mapping=older)
        assert [await codes(good), await codes(bad), await codes("")] == [[200, 200], [401, 401], [401, 401]]
        new, _ = await broker.tokens.create("environment")
        assert await codes(new) == [200, 200]
    await broker.aclose()


async def test_health_tells_nobody_of_a_closed_run(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url, "secret-name")
    token, _ = await broker.tokens.create("trainer")
    async with (
        serving(build_app(broker, ShimSettings())) as url,
        door(broker) as generations,
        httpx.AsyncClient(base_url=url) as client,
    ):
        for headers in ({}, bearer("lachesis_guess")):
            assert (await client.get("/healthz", headers=headers)).json() == {"status": "ok"}
            async with generations.get("/health", headers=headers) as answer:
                assert await answer.json() == {"status": "ok"}
        assert (await client.get("/healthz", headers=bearer(token))).json()["run"] == "secret-name"
        async with generations.get("/health", headers=bearer(token)) as answer:
            assert "ready" in await answer.json()
        assert (await client.get("/runs/open/healthz")).json()["run"] == "open"
        redis_server.stop()
        answers = [await client.get("/healthz", headers=headers) for headers in ({}, bearer(token))]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert answers[0].json() == {"status": "no redis"}
        assert answers[1].json()["run"] == "secret-name"
    await broker.aclose()


ADDRESSES = {
    "127.0.0.1": True, "127.8.9.1": True, "::1": True, "::ffff:127.0.0.1": True, "0.0.0.0": False, "::": False,
}  # fmt: skip


def bound(address: str) -> socket.socket:
    """A socket of that address on which nobody listens."""
    found = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if address.startswith("::ffff"):
        found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    found.bind((address, 0))
    return found


@pytest.mark.parametrize("address", ADDRESSES)
def test_beyond_this_machine_runs_are_closed_by_default(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes make of their settings, short of serving."""
    served: list[CallerSettings] = []

    async def serve(settings: CallerSettings, *_: object) -> None:
        served.append(settings)

    monkeypatch.setattr(main, "serve", serve)
    monkeypatch.setattr(front_door, "_main", serve)
    for given, closed in (({}, not ADDRESSES[address]), ({"open_runs": True}, False), ({"require_tokens": True}, True)):
        with bound(address) as listener, socket.socket(fileno=socket.dup(listener.fileno())) as again:
            assert is_loopback(again) is ADDRESSES[address]
            shared: dict[str, Any] = {"redis_url": "redis://127.0.0.1:1/0", **given}
            assert main.run(ShimSettings(fd=listener.detach(), **shared)) == 0  # which closes it
            assert front_door.run(FrontDoorSettings(fd=again.fileno(), **shared)) == 0
        assert [settings.require_tokens for settings in served] == [closed, closed]
        served.clear()


def test_both_at_once_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="exclude each other"):
        ShimSettings(open_runs=True, require_tokens=True).on([])


def test_no_header_names_another_address(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path) -> None:
    with (
        connect_blocking(shared_redis.url, run_name) as blocking,
        shim_process(
            log := tmp_path / "log", "--redis-url", shared_redis.url, "--run", run_name, "--port", "0"
        ) as shim,
    ):
        url = wait_for_url(log, shim)
        assert httpx.post(f"{url}/register", json=TRAINER).status_code == 200
        forged = {"X-Forwarded-For": "10.9.9.9", "Forwarded": "for=10.9.9.9", "X-Real-IP": "10.9.9.9"}
        assert httpx.get(f"{url}/batch", headers=forged).status_code == 200
        known = blocking.call(blocking.broker.redis.hkeys, blocking.broker.keys.trainers)
        assert b"http:127.0.0.1" in known
        assert not [name for name in known if b"10.9.9.9" in name]


def wait_for_url(log: Path, shim: Any) -> str:
    found: list[str] = []
    while not found:
        assert shim.poll() is None, log.read_text()
        found = re.findall(r"http://\S+", log.read_text())
    wait_until_up(f"{found[0]}/healthz", shim, log)
    return found[0]

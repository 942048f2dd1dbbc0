"""What Redis's refusals are taken for, and how long they are waited for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from ports import free_port
from redis._parsers import BaseParser
from redis.exceptions import OutOfMemoryError, ResponseError
from replicas import founded
from sick_redis import pair, sick_redis, until

from lachesis.broker import Broker, ConfigurationError, EmbeddedRedis, RedisUnsuitable, connect_blocking
from lachesis.broker.store.connection import hide_password, open_redis, patience
from lachesis.broker.store.redis_errors import Trouble, describe, trouble
from lachesis.service.http.access import ADMIN, Access, Denied
from lachesis.trainer.elastic.heartbeat import is_stopped
from lachesis.trainer.writer_lock import WriterLease

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

REPLIES = {
    "NOREPLICAS Not enough good replicas to write.": Trouble.UNREADY,
    "MISCONF Redis is configured to save RDB snapshots, but it's unable to persist to disk.": Trouble.UNREADY,
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": Trouble.UNREADY,
    "LOADING Redis is loading the dataset in memory": Trouble.UNREADY,
    "CLUSTERDOWN Hash slot not served": Trouble.UNREADY,
    "TRYAGAIN Multiple keys request during rehashing of slot": Trouble.UNREADY,
    "ASK 3999 127.0.0.1:6381": Trouble.UNREADY,
    "READONLY You can't write against a read only replica. script: 9b, on @user_script:3.": Trouble.DEMOTED,
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": Trouble.DEMOTED,
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)": Trouble.DEMOTED,
    "MOVED 3999 127.0.0.1:6381": Trouble.DEMOTED,
    "OOM command not allowed when used memory > 'maxmemory'.": Trouble.FULL,
    "NOPERM User shim has no permissions to run the 'set' command": Trouble.FORBIDDEN,
    "ERR ACL failure in script: User shim has no permissions to run the 'hset' command script: on @user_script:6.": Trouble.FORBIDDEN,
    "WRONGPASS invalid username-password pair or user is disabled.": Trouble.FORBIDDEN,
    "ERR max number of clients reached": Trouble.LOST,
    "BUSYGROUP Consumer Group name already exists": None,
    "WRONGTYPE Operation against a key holding the wrong kind of value": None,
    "ERR unknown command 'NOREPLICAS'": None,
}


@pytest.mark.parametrize("reply", REPLIES)
def test_each_reply_is_taken_for_what_it_is(reply: str) -> None:
    error = BaseParser.parse_error(reply)
    assert trouble(error) is REPLIES[reply]
    if REPLIES[reply] is not None:
        assert describe(error).startswith("Redis ")
        assert "\n" not in describe(error)


async def test_a_refusal_within_a_pipeline_is_one(tmp_path: Path) -> None:
    async with sick_redis(tmp_path) as (url, sick):
        redis = open_redis(url)
        pipe = redis.pipeline(transaction=False).get("a").set("a", "1")
        async with sick("NOREPLICAS"):
            with pytest.raises(ResponseError) as error, patience(0):
                await pipe.execute()
        assert trouble(error.value) is Trouble.UNREADY
        await redis.aclose()


# -- patience -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["NOREPLICAS", "BUSY", "READONLY"])
async def test_commands_wait_for_a_server_that_refuses_them(tmp_path: Path, code: str) -> None:
    async with sick_redis(tmp_path) as (url, sick):
        broker = await Broker.connect(url)
        async with sick(code):
            with pytest.raises(ResponseError), patience(0.1):
                await broker.redis.set("a", "1")
            with pytest.raises(ResponseError), patience(60, unless=lambda: True):
                await broker.redis.set("a", "1")
            over_pool, over_wire = (
                asyncio.create_task(call)
                for call in (broker.redis.set("a", "1"), broker.connections.multiplexed.call(("SET", "b", "1")))
            )
            done, _ = await asyncio.wait([over_pool, over_wire], timeout=0.2)
            assert not done
        assert (await over_pool, await over_wire) == (True, [b"OK"])
        await broker.aclose()


async def test_what_is_full_or_forbidden_is_told_at_once(tmp_path: Path) -> None:
    async with sick_redis(tmp_path, user=True) as (url, sick):
        broker = await Broker.connect(url)
        async with sick("OOM"):
            with pytest.raises(OutOfMemoryError):
                await broker.redis.set("a", "1")
        async with sick("NOPERM"):
            with pytest.raises(ResponseError):
                await broker.redis.set("a", "1")
            with patience(60, forbidden=True):
                waiting = asyncio.create_task(broker.redis.set("a", "1"))
                await asyncio.sleep(0)
        assert await waiting
        await broker.aclose()


async def test_every_pool_leaves_a_server_that_was_demoted(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        broker = await Broker.connect(both.url)
        clients = (broker.redis, broker.connections.blocking, broker.connections.heartbeats)
        for client in clients:
            await client.set("a", "old")
        await broker.connections.multiplexed.call(("GET", "a"))
        await both.demote()
        both.switch()
        assert await broker.connections.multiplexed.call(("SET", "a", "new")) == [b"OK"]  # the first to hear of it
        ports = {(await client.info("server"))["tcp_port"] for client in clients}
        assert ports == {(await both.clients[1].info("server"))["tcp_port"]}
        assert await both.clients[1].get("a") == b"new"
        await broker.aclose()


async def test_nobody_takes_a_refusal_for_an_empty_answer(tmp_path: Path) -> None:
    """A batch that no reader is known of would be freed."""
    async with sick_redis(tmp_path) as (url, sick):
        broker = await Broker.connect(url)
        await broker.queue.subscribe("main")
        assert list(await broker.queue.retention.readers()) == ["main"]
        async with sick("BUSY"):
            for ask in (
                broker.queue.retention.readers, broker.queue.readers, broker.queue.shadows.readings, broker.queue.newest_group,
                broker.reset, lambda: broker.members.members("main"),
            ):  # fmt: skip
                with pytest.raises(ResponseError, match="BUSY"), patience(0):
                    await ask()
        await broker.aclose()


# -- the writer lock ----------------------------------------------------------------------------------------------


async def test_a_lock_that_lapsed_while_nobody_could_take_it_is_kept(broker: Broker) -> None:
    lock, other = (broker.registry.writer("main", ttl_s=60) for _ in range(2))
    assert await lock.acquire(blocking=False)
    await broker.redis.delete(lock.name)  # as its term's end does
    assert await lock.extend(60, replace_ttl=True)
    assert not await other.acquire(blocking=False)


async def test_a_lock_that_another_had_meanwhile_is_lost(broker: Broker) -> None:
    lock, other = (broker.registry.writer("main", ttl_s=60) for _ in range(2))
    assert await lock.acquire(blocking=False)
    await broker.redis.delete(lock.name)
    assert await other.acquire(blocking=False)
    await other.release()
    with pytest.raises(Exception, match="another process has taken it"):
        await lock.extend(60, replace_ttl=True)
    assert not await lock.owned()


async def test_a_lock_that_replicas_had_meanwhile_is_lost(broker: Broker) -> None:
    await founded(broker, "a")
    await broker.redis.delete(broker.keys.writer("main"))
    lock = broker.registry.writer("main", ttl_s=60)
    assert await lock.acquire(blocking=False)
    await broker.redis.delete(lock.name)
    assert await broker.members.beat("main", "a", hold_s=60)
    await broker.redis.delete(lock.name)
    with pytest.raises(Exception, match="another process has taken it"):
        await lock.extend(60, replace_ttl=True)


def test_a_trainer_outlives_refusals_that_are_longer_than_its_lock(tmp_path: Path) -> None:
    async def refuse_for_longer(url: str) -> None:
        redis = open_redis(url)
        await redis.config_set("min-replicas-to-write", 1)

        async def lapsed() -> bool:
            return not await redis.exists(key)

        await until(lapsed)
        await redis.config_set("min-replicas-to-write", 0)
        await redis.aclose()

    with EmbeddedRedis(tmp_path) as server, connect_blocking(server.url) as blocking:
        key = blocking.broker.keys.writer("main")
        with WriterLease(blocking, "main", ttl_s=1.0) as writer_lease:
            assert writer_lease.wait(unless=lambda: False, on_standby=lambda: None)
            asyncio.run(refuse_for_longer(server.url))

            async def held() -> bool:
                writer_lease.check()
                return bool(await asyncio.to_thread(blocking.call, blocking.broker.members.is_held, "main"))

            asyncio.run(until(held))
            writer_lease.check()


# -- a full server ------------------------------------------------------------------------------------------------


async def test_a_full_server_lets_tokens_and_meetings_through(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    _, kept = await broker.tokens.create("admin", "kept")
    me = await founded(broker)
    await broker.redis.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        await broker.redis.set("a", "1")
    await broker.tokens.create("trainer", "made")
    assert (await broker.tokens.revoke(kept.name)).revoked_at is not None
    assert [record.revoked_at is None for record in await broker.tokens.all()] == [False, True]
    await broker.members.put_address(me, "0:1", b"here")
    assert await broker.members.get_address(me, "0:1") == b"here"
    await broker.aclose()


# -- what is refused at the start ---------------------------------------------------------------------------------


async def test_a_replica_is_refused_and_its_master_named(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        both.switch()
        master = (await both.clients[0].info("server"))["tcp_port"]
        with pytest.raises(
            RedisUnsuitable, match=rf"is a replica.*give its master's address \(127.0.0.1:{master}"
        ) as error:
            await Broker.connect(both.url)
    assert "\n" not in str(error.value)


async def test_a_cluster_of_several_nodes_is_refused_and_one_of_one_node_serves(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    config = [
        [f"port {port}", f"cluster-port {free_port()}", "bind 127.0.0.1", "cluster-enabled yes"] for port in ports
    ]
    with (
        EmbeddedRedis(tmp_path / "a", config=config[0]) as one,
        EmbeddedRedis(tmp_path / "b", config=config[1]) as two,
    ):
        first, second = open_redis(one.url), open_redis(two.url)

        async def joined() -> bool:
            return (await first.execute_command("CLUSTER INFO"))["cluster_state"] == "ok"

        await first.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        await until(joined)
        broker = await Broker.connect(one.url)
        await broker.enlist()
        assert await broker.runs()
        await broker.aclose()
        await first.execute_command("CLUSTER DELSLOTSRANGE", 8192, 16383)
        await second.execute_command("CLUSTER ADDSLOTSRANGE", 8192, 16383)
        await first.execute_command("CLUSTER MEET", "127.0.0.1", ports[1], config[1][1].split()[1])

        async def met() -> bool:
            return (await first.execute_command("CLUSTER INFO"))["cluster_size"] == "2"

        await until(met)
        with pytest.raises(RedisUnsuitable, match=r"cluster of several nodes \(2 hold slots\): use "):
            await Broker.connect(one.url)
        for client in (first, second):
            await client.aclose()


@pytest.mark.parametrize("database", ["notanumber", "-1", "0/1", "1.0", "٣"])
async def test_a_database_that_is_no_number_is_refused(database: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^redis_url = 'redis://127.0.0.1:1/.*must be a number"):
        await Broker.connect(f"redis://127.0.0.1:1/{database}")


async def test_a_database_that_the_server_lacks_is_refused(redis_server: EmbeddedRedis) -> None:
    with pytest.raises(ConfigurationError, match=r"db=99.*no such database.*; use /0"):
        await Broker.connect(f"{redis_server.url}?db=99")


# -- passwords ----------------------------------------------------------------------------------------------------

URLS = (
    "redis://:secret@h:1/0", "redis://user:secret@h/0", "rediss://user:secret@h:1/0?ssl_cert_reqs=none", "redis://h:1/0?password=secret",
    "redis://h:1/0?db=1&password=secret&username=u", "unix:///run/redis.sock?password=secret&db=1", "unix://u:secret@/run/redis.sock",
    "redis://h/0?p%61ssword=secret", "redis://h/0?password=se%20secret", "redis://u:pa/secret@h:1/0", "redis://u:p?secret@h:1/0",
    "redis://u:p#secret@h:1/0", "redis://u:p@secret@h:1/0", "redis://u:secret@[::1]:1/0", "rediss://h/0?ssl_password=secret",
    "http://u:secret@h/runs/a", "redis://u:se:secret@h:notaport/0", "redis://h:port/0?password=secret",
)  # fmt: skip


@pytest.mark.parametrize("url", URLS)
async def test_no_form_of_url_shows_its_password(url: str) -> None:
    assert "secret" not in hide_password(url)
    with pytest.raises(Exception, match=r"redis_url = |no Redis answers|refuses") as error, patience(0):
        await Broker.connect(url)
    assert "secret" not in f"{error.value}"
    assert "\n" not in f"{error.value}"


# -- heartbeats and tokens ----------------------------------------------------------------------------------------


def test_a_process_that_goes_while_it_is_looked_at_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: Path) -> str:
        raise ProcessLookupError

    assert not is_stopped(os.getpid())
    monkeypatch.setattr(Path, "read_text", gone)
    assert not is_stopped(os.getpid())


async def test_unknown_tokens_share_one_look_at_the_known_ones(broker: Broker) -> None:
    await broker.tokens.create("admin")
    access = Access(broker, required=False)

    async def looks() -> int:
        return int((await broker.redis.info("commandstats"))["cmdstat_hgetall"]["calls"])

    async def ask(number: int) -> None:
        with pytest.raises(Denied):
            await access.check(f"Bearer wrong{number}", ADMIN)

    await ask(0)
    before = await looks()
    await asyncio.gather(*map(ask, range(50)))
    assert await looks() - before <= 1
    token, _ = await broker.tokens.create("admin", "later")
    await access.check(f"Bearer {token}", ADMIN)

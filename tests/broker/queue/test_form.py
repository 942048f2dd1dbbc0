"""FORM on a real Redis: minimums and patience, what it reads, and what its replicas leave when they are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from scored import group, trained
from silent import silence

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.queue.form import MINIMUM_WAIT_S
from lachesis.broker.records.registrations import EnvConfig
from lachesis.broker.run.environments import ALIVE_S

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def put(broker: Broker, numbers: range, size: int, env: int | None = 0) -> None:
    for number in numbers:
        assert await broker.queue.put(f"g{number}", group(number, size, env), v_min=0, v_max=0) == "stored"


async def register(broker: Broker, *allocations: float | None) -> None:
    for env_id, allocation in enumerate(allocations):
        config = EnvConfig(64, "sums", 1.0, 2, allocation)
        assert (await broker.registry.register_env(config, f"env{env_id}")).env_id == env_id


async def formed(broker: Broker, batch_size: int) -> list[int] | None:
    """The numbers of the groups of the next batch."""
    step = await broker.queue.form(batch_size)
    batch = await broker.queue.batch(step) if step else None
    return [int(gid[1:]) for gid in batch.gids] if batch else None


async def calls(broker: Broker, command: str) -> int:
    stats = await broker.redis.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


# -- minimums -----------------------------------------------------------------------------------------------------


async def test_each_environment_gets_its_minimum_and_the_rest_is_oldest_first(broker: Broker) -> None:
    await register(broker, None, 0.5, 0.25)
    await put(broker, range(8), 2, env=0)
    await put(broker, range(8, 12), 2, env=1)
    await put(broker, range(12, 14), 2, env=2)
    assert await formed(broker, 8) == [0, 8, 9, 12]
    assert await formed(broker, 8) == [1, 10, 11, 13]


async def test_a_batch_waits_for_a_living_environment_but_not_for_ever(broker: Broker) -> None:
    await register(broker, None, 0.5)
    await put(broker, range(4), 2, env=0)
    before = time.time()
    for _ in range(2):
        assert await formed(broker, 4) is None
    mark = float(await broker.redis.hget(broker.keys.state, "missing:1"))
    assert before - 1 < mark <= time.time()

    await put(broker, range(4, 5), 2, env=1)
    assert await formed(broker, 4) == [0, 4]
    assert not await broker.redis.hexists(broker.keys.state, "missing:1")

    assert await formed(broker, 4) is None
    await broker.redis.hset(broker.keys.state, "missing:1", time.time() - MINIMUM_WAIT_S)  # as if so long had passed
    assert await formed(broker, 4) == [1, 2]
    await put(broker, range(5, 6), 2, env=0)
    assert await formed(broker, 4) == [3, 5], "it is still missing, and was waited for"


async def test_nobody_waits_for_what_no_batch_could_use_yet(broker: Broker) -> None:
    await register(broker, None, 0.5)
    await put(broker, range(1), 2, env=0)
    assert await formed(broker, 4) is None
    assert not await broker.redis.hexists(broker.keys.state, "missing:1")


async def test_a_dead_environment_holds_up_nobody_until_it_calls_again(broker: Broker) -> None:
    await register(broker, None, 0.5)
    await silence(broker, 1)
    await put(broker, range(4), 2, env=0)
    assert await formed(broker, 4) == [0, 1]
    await broker.registry.touch_env(1)
    assert await formed(broker, 4) is None


async def test_a_disconnected_environment_holds_up_nobody(broker: Broker) -> None:
    await register(broker, None, 0.5)
    record = await broker.registry.env(1)
    assert record is not None
    await broker.registry.update_env(type(record)(1, record.name, record.config, connected=False))
    await put(broker, range(2), 2, env=0)
    assert await formed(broker, 4) == [0, 1]


async def test_minimums_that_sizes_make_impossible_hold_up_nobody(broker: Broker) -> None:
    await register(broker, None, 0.75)
    await put(broker, range(1), 3, env=1)
    await put(broker, range(1, 5), 4, env=0)
    assert await formed(broker, 8) == [1, 2]
    await put(broker, range(5, 6), 1, env=0)
    assert await formed(broker, 8) == [0, 3, 5]


async def test_a_full_redis_still_forms_with_and_without_patience(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    await register(broker, None, 0.5)
    await put(broker, range(4), 2, env=0)
    await broker.redis.config_set("maxmemory", "1mb")
    assert await formed(broker, 4) is None
    assert await broker.redis.hexists(broker.keys.state, "missing:1")
    await broker.scripts.set_fields(keys=[broker.keys.state], args=["missing:1", "0"])
    assert await formed(broker, 4) == [0, 1]
    await broker.aclose()


# -- environments that call ---------------------------------------------------------------------------------------


async def test_that_an_environment_called_is_noted_once_in_a_while(broker: Broker) -> None:
    await register(broker, None)
    assert await broker.registry.touch_env(7) is None
    before = await calls(broker, "zadd")
    for _ in range(50):
        heard = await broker.registry.touch_env(0)
        assert heard is not None
        assert heard.name == "sums_0"
    assert await calls(broker, "zadd") == before + 1
    assert await broker.redis.zrange(broker.keys.heard, 0, -1) == [b"0"]
    (record,) = await broker.registry.envs()
    assert abs(record.heard_at - time.time()) < ALIVE_S


async def test_after_a_reset_an_id_is_whoever_registers_next(broker: Broker) -> None:
    await register(broker, 0.5)
    assert await broker.registry.touch_env(0)
    await broker.reset()
    assert await broker.registry.touch_env(0) is None
    await register(broker, None)
    heard = await broker.registry.touch_env(0)
    assert heard is not None
    assert heard.config.min_batch_allocation is None


# -- what it reads ------------------------------------------------------------------------------------------------


async def test_what_cannot_make_a_batch_is_not_read(broker: Broker) -> None:
    await put(broker, range(40), 3)
    before = await calls(broker, "xrange")
    for batch_size in (8, 40, 121, 10**18, 0):
        assert await formed(broker, batch_size) is None
    assert await calls(broker, "xrange") == before


async def test_one_group_far_behind_thousands_that_do_not_fit_makes_a_batch(broker: Broker) -> None:
    async with broker.redis.pipeline(transaction=False) as pipe:  # as PUT leaves them
        for number in range(5000):
            fields = {"gid": f"g{number}", "env": "0", "n": 3, "tok": 9, "v_min": 0, "v_max": 0, "bytes": 1}
            pipe.xadd(broker.keys.groups, fields)
        pipe.hset(broker.keys.state, mapping={"groups": 5000, "sequences": 15000, "bytes": 5000, "waiting:0:3": 5000})
        await pipe.execute()
    assert await formed(broker, 8) is None
    await put(broker, range(5000, 5001), 2, env=None)
    assert await formed(broker, 8) == [0, 1, 5000]
    assert await formed(broker, 8) is None
    status = await broker.queue.status()
    assert status.waiting == {"0": {3: 4998}}


async def test_status_counts_formed_batches_without_reading_them(broker: Broker) -> None:
    await put(broker, range(10), 2)
    await broker.queue.subscribe("main")
    await broker.queue.subscribe("shadow")
    for _ in range(4):
        assert await broker.queue.form(4)
    before = await calls(broker, "xrange")
    status = await broker.queue.status()
    assert (status.groups, status.sequences, status.formed, status.delivered) == (10, 20, 4, 0)
    for policy, groups in (("main", 8), ("shadow", 8), ("shadow", 6), ("main", 6)):
        lease = await broker.queue.lease(policy, "a", lapse_s=600)
        assert lease is not None
        await broker.queue.commit(policy, lease, trained(lease.batch))
        status = await broker.queue.status()
        assert (status.groups, status.sequences) == (groups, 2 * groups)
    assert await calls(broker, "xrange") - before <= 6, "only LEASE and COMMIT look into streams, at one batch each"


# -- odd sizes ----------------------------------------------------------------------------------------------------


async def test_odd_groups_are_counted_until_they_make_up_the_size(broker: Broker) -> None:
    await broker.registry.register_env(EnvConfig(64, "sums", 1.0, 4), "one")
    env = await broker.registry.env(0)
    assert env is not None
    for number, (size, waiting) in enumerate([(4, 0), (3, 3), (2, 5), (2, 3), (1, 0), (5, 5)]):
        await put(broker, range(number, number + 1), size)
        assert await broker.queue.odd_sequences(env) == waiting
    await put(broker, range(10, 11), 3, env=1)
    assert await broker.queue.odd_sequences(env) == 5


# -- many replicas, killed ----------------------------------------------------------------------------------------


def start_former(url: str, run: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).parents[1] / "former.py"), url, run]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def test_replicas_killed_around_form_leave_exact_batches_and_counters(
    broker: Broker, shared_redis: EmbeddedRedis, run_name: str
) -> None:
    """Each of three formers is killed while it works, again and again, as groups of all sizes and environments arrive."""
    await register(broker, None, 0.25, 0.25)
    await silence(broker, 2)  # dead, and nobody waits for it
    await broker.queue.subscribe("main")
    chance = random.Random(0)
    put_so_far = 0

    async def produce() -> None:
        nonlocal put_so_far
        while True:
            sizes = [(chance.choice((1, 2, 3, 4, 5)), chance.choice((0, 1, None))) for _ in range(20)]
            for size, env in sizes:
                await put(broker, range(put_so_far, put_so_far + 1), size, env)
                put_so_far += 1
            await anyio.sleep(0.01)

    formers = [start_former(shared_redis.url, run_name) for _ in range(3)]
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(produce)
            for place in (0, 1, 2) * 4:
                former = formers[place]
                assert former.stdout is not None
                with anyio.fail_after(30):
                    assert await anyio.to_thread.run_sync(former.stdout.readline, abandon_on_cancel=True)
                await anyio.sleep(chance.uniform(0, 0.05))
                former.kill()
                former.wait()
                formers[place] = start_former(shared_redis.url, run_name)
            tasks.cancel_scope.cancel()
    finally:
        for former in formers:
            former.kill()
            former.wait()

    by_formers = (await broker.queue.status()).formed
    assert by_formers >= 12
    while lease := await broker.queue.lease_or_form("main", "last", 8, lapse_s=0):
        fetched = await broker.queue.fetch(lease.batch.gids)
        assert sum(len(found.tokens) for found in fetched) == lease.batch.n == 8
        await broker.queue.commit("main", lease, trained(lease.batch, "last"))
    report = await audit(broker)
    assert report.findings == []
    # a post that was cut off at the end may have been stored
    assert report.accepted in (put_so_far, put_so_far + 1)
    assert report.open == 0

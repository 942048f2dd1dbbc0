"""redis-py sends a command again when its reply was lost. Whatever the broker writes must then stand once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
from msgspec import structs
from replicas import founded, lent, opened
from reply_dropper import ReplyDropper, dropping_replies
from scored import group, trained

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.errors import Moved
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Limits, Lineage
from lachesis.broker.records.registrations import EnvConfig, TrainerConfig
from lachesis.broker.records.steps import Lease, Membership
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry
from lachesis.broker.replicas.members import Claimed, Rendezvous
from lachesis.broker.retention.shadows import Rule
from lachesis.broker.store.scripts import FILES

pytestmark = pytest.mark.anyio
ENV = EnvConfig(max_token_length=16, desired_name="sums", weight=1.0, group_size=2)
CONFIG = TrainerConfig("g", "p", 4, 16, "", 1, 0, 1)
STATUS = ServerStatus("s", "main", "http://s", "ready", 0, -1, 0.0)


class Run:
    """A run as `broker` sees it, through the proxy, and as it is (`direct`)."""

    def __init__(self, broker: Broker, direct: Broker, dropper: ReplyDropper) -> None:
        self.broker, self.direct, self.dropper = broker, direct, dropper

    def lose(self, script: str) -> None:
        self.dropper.lose(getattr(self.broker.scripts, script).sha)

    async def filled(self) -> None:
        """Two batches' worth of groups."""
        for number in range(4):
            await self.direct.queue.put(f"g{number}", group(number), v_min=0, v_max=0)
        await self.direct.queue.subscribe("main")

    async def leased(self) -> Lease:
        await self.filled()
        lease = await self.direct.queue.lease_or_form("main", "r", 4, lapse_s=60)
        assert lease is not None
        return lease

    async def length(self, stream: str) -> int:
        return int(await self.direct.redis.xlen(stream))

    async def holders(self) -> list[tuple[str, int]]:
        """(consumer, deliveries) of each pending batch."""
        pending = await self.direct.redis.xpending_range(self.direct.keys.batches, "main", "-", "+", 10)
        return [(entry["consumer"].decode(), entry["times_delivered"]) for entry in pending]


@pytest.fixture
async def run(shared_redis: EmbeddedRedis, run_name: str) -> AsyncIterator[Run]:
    direct = await Broker.connect(shared_redis.url, run_name)
    for name in FILES:  # so that the command that is lost is the one that does the work
        await direct.redis.script_load(getattr(direct.scripts, name).script)
    async with dropping_replies(str(shared_redis.socket)) as dropper:
        broker = await Broker.connect(dropper.url, run_name)
        yield Run(broker, direct, dropper)
        await broker.aclose()
    await direct.aclose()


async def read_arrival(run: Run) -> None:
    await run.direct.registry.register_trainer(CONFIG)
    run.lose("read_arrival")
    keys = run.broker.keys
    reply = await run.broker.scripts.read_arrival(
        keys=[keys.trainers, keys.weights("main"), keys.pools, keys.lineage, keys.old_lineage, keys.served], args=["d"]
    )
    assert reply == [msgspec.json.encode(CONFIG), [], [], 0, [None], -1]


async def record_lineage(run: Run) -> None:
    lineage, digest = Lineage(0, 1, ((0, 0, 1), (1, 1, 2)), b"12345678"), tokens_digest([1, 2])
    await run.direct.lineage.record([("other", lineage)])
    once = int(await run.direct.redis.hget(run.direct.keys.lineage, "bytes"))
    run.lose("record_lineage")
    assert await run.broker.lineage.record([(digest, lineage)]) == 0
    assert await run.direct.lineage.look_up([digest]) == [lineage]
    held = int(await run.direct.redis.hget(run.direct.keys.lineage, "bytes"))
    assert held == 2 * once + len(digest) - len("other")


async def put(run: Run) -> None:
    run.lose("put")
    await run.broker.queue.put("g1", group(1), v_min=0, v_max=0)
    status = await run.direct.queue.status()
    assert (status.accepted, status.groups, status.sequences) == (1, 1, 2)
    assert await run.length(run.direct.keys.groups) == 1
    assert await run.direct.redis.ttl(run.direct.keys.blob("g1")) == -1


async def lengths(run: Run) -> None:
    await run.filled()
    run.lose("lengths")
    assert [group.gid for group in await run.broker.queue.fetch(["g1", "g0"])] == ["g1", "g0"]


async def form(run: Run) -> None:
    await run.filled()
    run.lose("form")
    assert await run.broker.queue.form(4) == 1
    assert await run.length(run.direct.keys.batches) == 1
    assert (await run.direct.queue.status()).formed == 1


async def lease(run: Run) -> None:
    await run.filled()
    await run.direct.queue.form(4)
    await run.direct.queue.form(4)
    run.lose("lease")
    found = await run.broker.queue.lease("main", "r", lapse_s=60)
    assert found is not None
    assert found.batch.step == 1
    assert await run.holders() == [("r", 2)]
    assert (await run.direct.queue.status()).delivered == 1


async def mark_delivered(run: Run) -> None:
    await run.filled()
    await run.direct.queue.form(4)
    await run.direct.queue.form(4)
    run.lose("mark_delivered")
    await run.broker.queue.deliver(1)
    status = await run.direct.queue.status()
    assert (status.delivered, status.sequences) == (1, 4)


async def renew(run: Run) -> None:
    found = await run.leased()
    run.lose("renew")
    assert await run.broker.queue.renew("main", found)
    assert await run.holders() == [("r", 1)]


async def commit(run: Run) -> None:
    found = await run.leased()
    run.lose("commit")
    await run.broker.queue.commit("main", found, trained(found.batch))
    assert await run.length(run.direct.keys.ledger("main")) == 1
    assert await run.direct.redis.hget(run.direct.keys.state, "committed:main") == b"1"


async def retire(run: Run) -> None:
    found = await run.leased()
    await run.direct.queue.commit("main", found, trained(found.batch))
    run.lose("retire")
    await run.broker.queue.retire("main", 1)
    assert await run.length(run.direct.keys.batches) == 0
    assert await run.direct.redis.exists(run.direct.keys.blob("g0"), run.direct.keys.blob("g3")) == 1


async def keep_refused(run: Run) -> None:
    run.lose("keep_refused")
    await run.broker.queue.keep_refused("refused-bad", b"{}", "invalid", "test")
    assert await run.length(run.direct.keys.refused) == 1


async def drop(run: Run) -> None:
    await run.direct.queue.put("g1", group(1), v_min=0, v_max=0, limits=Limits(max_lag=1))
    await run.direct.weights.publish("main", WeightsEntry(5, 5, "file:///v5", "0", 1, "BF16", 4))
    run.lose("drop")
    assert await run.broker.queue.form(2) is None
    assert await run.length(run.direct.keys.dead) == 1
    status = await run.direct.queue.status()
    assert (status.groups, status.sequences, status.dead) == (0, 0, 1)


async def requeue(run: Run) -> None:
    await drop(run)
    run.dropper.lost = 0
    (letter,) = await run.direct.dead.accepted()
    (found,) = await run.direct.queue.fetch([letter.entry.gid])
    run.lose("requeue")
    await run.broker.dead.requeue(letter, found, 100)
    assert (await run.length(run.direct.keys.dead), await run.length(run.direct.keys.groups)) == (0, 1)
    status = await run.direct.queue.status()
    assert (status.groups, status.sequences, status.dead) == (1, 2, 0)


async def purge(run: Run) -> None:
    await drop(run)
    run.dropper.lost = 0
    (letter,) = await run.direct.dead.accepted()
    run.lose("purge")
    await run.broker.dead.purge(letter, who="test")
    assert await run.length(run.direct.keys.control) == 1
    status = await run.direct.queue.status()
    assert (status.dead, status.purged) == (0, 1)


async def replace_registration(run: Run) -> None:
    run.lose("replace_registration")
    await run.broker.registry.adopt(b"", CONFIG, step_offset=3)
    assert await run.direct.registry.trainer_config() == CONFIG
    assert await run.direct.redis.hget(run.direct.keys.trainers, "step_offset") == b"3"


async def refit(run: Run) -> None:
    await run.filled()
    assert await run.direct.queue.form(4) == 1
    await run.direct.registry.register_trainer(structs.replace(CONFIG, batch_size=2))
    run.lose("refit")
    await run.broker.queue.refit.if_due("main")
    assert await run.length(run.direct.keys.batches) == 0
    assert [entry.gid for _, entry in await run.direct.queue.queued()] == [f"g{number}" for number in range(4)]
    assert (await audit(run.direct)).findings == []


async def advance_checkpoint(run: Run) -> None:
    await run.filled()
    run.lose("advance_checkpoint")
    assert await run.broker.queue.retention.advance_checkpoint("main", 3)
    assert await run.direct.queue.retention.readers() == {"main": 3}


async def leave(run: Run) -> None:
    await run.filled()
    run.lose("leave")
    await run.broker.queue.retention.leave("main")
    assert await run.direct.queue.retention.readers() == {}


async def reset(run: Run) -> None:
    await run.leased()
    run.lose("reset")
    await run.broker.reset()
    assert (await run.direct.queue.status()).accepted == 0


async def subscribe(run: Run) -> None:
    run.lose("subscribe")
    await run.broker.queue.subscribe("main", Rule("lossy", 2))
    assert len(await run.direct.redis.xinfo_groups(run.direct.keys.batches)) == 1
    assert await run.direct.queue.shadows.rules() == {"main": Rule("lossy", 2)}


async def list_run(run: Run) -> None:
    run.lose("list_run")
    await run.broker.enlist(10_000)
    assert run.direct.keys.run in await run.direct.runs()


async def note_trainer_call(run: Run) -> None:
    run.lose("note_trainer_call")
    keys = [run.direct.keys.trainers, run.direct.keys.batches]
    assert await run.broker.scripts.note_trainer_call(keys=keys, args=["http:t", "1.0", "main", 1, 600]) == 1
    assert await run.direct.redis.hgetall(run.direct.keys.trainers) == {b"http:t": b"1.0"}


async def register_env(run: Run) -> None:
    run.lose("register_env")
    record = await run.broker.registry.register_env(ENV, "nonce")
    assert await run.direct.registry.envs() == [record]
    assert (await run.direct.registry.register_env(ENV, "other")).env_id == 1


async def update_env(run: Run) -> None:
    record = structs.replace(await run.direct.registry.register_env(ENV, "nonce"), connected=False)
    run.lose("update_env")
    await run.broker.registry.update_env(record)
    assert await run.direct.redis.hget(run.direct.keys.envs, "changes") == b"1"
    assert await run.direct.registry.envs() == [
        structs.replace(record, heard_at=(await run.direct.registry.envs())[0].heard_at)
    ]


async def touch_env(run: Run) -> None:
    await run.direct.registry.register_env(ENV, "nonce")
    run.lose("touch_env")
    heard = await run.broker.registry.touch_env(0)
    assert heard is not None
    assert await run.direct.redis.zcard(run.direct.keys.heard) == 1


async def take_writer_lock(run: Run) -> None:
    run.lose("take_writer_lock")
    assert await run.broker.registry.writer("main", ttl_s=60).acquire(blocking=False)
    assert not await run.direct.registry.writer("main", ttl_s=60).acquire(blocking=False)


async def server_heartbeat(run: Run) -> None:
    run.lose("server_heartbeat")
    await run.broker.registry.report(STATUS)
    assert await run.direct.registry.servers() == [STATUS]
    assert await run.direct.redis.zrange(run.direct.keys.served, 0, -1) == [b"0"]


async def keep_writer_lock(run: Run) -> None:
    lock = run.broker.registry.writer("main", ttl_s=60)
    assert await lock.acquire(blocking=False)
    await run.direct.redis.delete(lock.name)
    run.lose("keep_writer_lock")
    assert await lock.extend(60, replace_ttl=True)
    assert await lock.owned()


async def publish(run: Run) -> None:
    run.lose("publish")
    await run.broker.weights.publish("main", WeightsEntry(0, 0, "file:///v0", "0", 1, "BF16", -1))
    assert await run.length(run.direct.keys.weights("main")) == 1


async def set_pool_rule(run: Run) -> None:
    run.lose("set_pool_rule")
    assert await run.broker.pools.set_rule("main", PoolRule("pin", 3), "0-0")
    assert await run.length(run.direct.keys.rule("main")) == 1
    assert not await run.direct.pools.set_rule("main", PoolRule("pin", 4), "0-0")


async def take_update_slot(run: Run) -> None:
    run.lose("take_update_slot")
    assert await run.broker.pools.take_turn("main", "s", 1, 60)
    assert not await run.direct.pools.take_turn("main", "other", 1, 60)


async def append_capped(run: Run) -> None:
    run.lose("append_capped")
    await run.broker.journal.metric("step", {"reward": 0.5})
    assert await run.length(run.direct.keys.metrics) == 1


async def set_fields(run: Run) -> None:
    run.lose("set_fields")
    await run.broker.registry.start()
    assert await run.direct.registry.started()


async def set_fields_if_new(run: Run) -> None:
    run.lose("set_fields_if_new")
    _, record = await run.broker.tokens.create("admin", "a")
    assert await run.direct.tokens.all() == [record]


async def start_generation(run: Run) -> None:
    await run.filled()
    run.lose("start_generation")
    me = await founded(run.broker)
    assert me == Membership("main", "a", 1, 1)
    assert [member.id for member in await run.direct.members.members("main")] == ["a"]


async def join(run: Run) -> None:
    await run.filled()
    await founded(run.direct)
    run.lose("join")
    assert await run.broker.members.join("main", "b", generation=1, step=0) == Membership("main", "b", 1, 2)
    assert [member.id for member in await run.direct.members.members("main")] == ["a", "b"]


async def replica_heartbeat(run: Run) -> None:
    await run.filled()
    await founded(run.direct)
    run.lose("replica_heartbeat")
    assert await run.broker.members.beat("main", "a", hold_s=60)


async def evict(run: Run) -> None:
    await join(run)
    run.dropper.lost = 0
    run.lose("evict")
    assert await run.broker.members.evict("main", silent_s=60, limits={"b": 0}) == 0  # of the call that was answered
    epoch_state = await run.direct.members.epoch_state("main")
    assert epoch_state is not None
    assert epoch_state.epoch == 3


async def rendezvous(run: Run) -> None:
    await run.filled()
    me = await founded(run.direct)
    run.lose("rendezvous")
    assert await run.broker.members.rendezvous(me) == Rendezvous(0, {"a": 0})


async def mark_current(run: Run) -> None:
    await run.filled()
    await founded(run.direct)
    me = await run.direct.members.join("main", "b", generation=1, step=-1)
    assert me is not None
    run.lose("mark_current")
    await run.broker.members.mark_current(me, 0)
    assert [member.step for member in await run.direct.members.members("main")] == [0, 0]


async def open_step(run: Run) -> None:
    await run.filled()
    me = await founded(run.direct)
    step = await lent(run.direct)
    run.lose("open_step")
    assert await run.broker.members.open_step(me, step)
    assert await run.length(run.direct.keys.work("main")) == 2


async def claim_groups(run: Run) -> None:
    await run.filled()
    me = await opened(run.direct)
    run.lose("claim_groups")
    assert await run.broker.members.claim(me, 1, count=1, held=0) == Claimed(((0, "g0"),), left=1)
    assert [member.holds for member in await run.direct.members.members("main")] == [1]


async def vote(run: Run) -> None:
    await run.filled()
    me = await opened(run.direct)
    await run.direct.members.claim(me, 1, count=2, held=0)
    batch = await run.direct.queue.batch(1)
    assert batch is not None
    run.lose("vote")
    assert await run.broker.members.vote(me, 1, "digest", trained(batch))
    assert await run.length(run.direct.keys.ledger("main")) == 1
    assert await run.direct.redis.hget(run.direct.keys.state, "committed:main") == b"1"
    assert [member.trained for member in await run.direct.members.members("main")] == [2]


async def close_step(run: Run) -> None:
    await run.filled()
    me = await opened(run.direct)
    run.lose("close_step")
    with pytest.raises(Moved):  # the call that was answered finds the epoch over
        await run.broker.members.close_step(me, 1, why="it can't be trained")
    epoch_state = await run.direct.members.epoch_state("main")
    assert epoch_state is not None
    assert (epoch_state.epoch, epoch_state.open) == (2, 0)


SCRIPTS = {case.__name__: case for case in (
    read_arrival, put, lengths, record_lineage, keep_refused, form, drop, lease, mark_delivered, renew, commit, retire, advance_checkpoint, leave, requeue, refit, purge, reset, subscribe, take_writer_lock,
    keep_writer_lock, replace_registration, list_run, note_trainer_call, register_env, update_env, touch_env,
    server_heartbeat, publish, set_pool_rule, take_update_slot, append_capped, set_fields, set_fields_if_new, start_generation, join, replica_heartbeat, evict, rendezvous, mark_current, open_step, claim_groups, vote,
    close_step,
)}  # fmt: skip


def test_no_script_is_left_out() -> None:
    assert set(SCRIPTS) == set(FILES)


@pytest.mark.parametrize("case", SCRIPTS.values(), ids=SCRIPTS)
async def test_a_script_whose_reply_is_lost_counts_once(run: Run, case: Callable[[Run], Awaitable[None]]) -> None:
    await case(run)
    assert run.dropper.lost == 1
    assert (await audit(run.direct)).findings == []


async def test_registrations_are_what_was_set_last(run: Run) -> None:
    for operation in (
        lambda: run.broker.registry.register_trainer(CONFIG),
        lambda: run.broker.registry.start(),
        lambda: run.broker.registry.withdraw("s"),
    ):
        run.dropper.lose(f"lachesis:{{{run.direct.keys.run}}}")
        await operation()
    assert run.dropper.lost == 3
    assert await run.direct.registry.trainer_config() == CONFIG
    assert await run.direct.registry.started()


async def test_the_writer_lock_is_extended_and_released(run: Run) -> None:
    lock = run.broker.registry.writer("main", ttl_s=60)
    assert await lock.acquire(blocking=False)
    for operation in (lambda: lock.extend(60, replace_ttl=True), lock.release):
        run.dropper.lose(run.direct.keys.writer("main"))
        await operation()
    assert run.dropper.lost == 2
    assert await run.direct.registry.writer("main", ttl_s=60).acquire(blocking=False)


async def test_scripts_survive_that_the_server_forgets_them(run: Run) -> None:
    await run.direct.redis.script_flush()
    await put(run)  # its first command is answered NOSCRIPT, and that answer is lost, too
    assert run.dropper.lost == 1

"""Records as another version wrote them, or somebody by hand: read where that can be, else passed over and told.

`stored_records.json` holds what an earlier release's own code wrote (see stored_records.py); it must stay readable.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from queued import ENV, put
from scored import group, trained
from stored_records import ENTRIES, FIELDS, FILE, GROUP, LINEAGE, VERSIONS

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.errors import InvalidGroup, Unreadable
from lachesis.broker.records.blobs import from_blob, to_blob
from lachesis.broker.records.entries import from_entry, from_json, read_entries, read_json, to_entry
from lachesis.broker.records.groups import GroupEntry
from lachesis.broker.records.packing import pack, to_scored
from lachesis.broker.records.registrations import TokenRecord, TrainerConfig
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry
from lachesis.broker.run.lineage import from_record, to_record

STORED = json.loads(FILE.read_text())
entries = st.sampled_from(ENTRIES)
fields = st.sampled_from(FIELDS)
names = st.text("abcdefghij_", min_size=12, max_size=14)  # of no field that there is
anything = st.binary(max_size=20)


whatever_the_load = settings(deadline=None, suppress_health_check=list(HealthCheck))


def needed(record: msgspec.Struct) -> list[str]:
    return [each.encode_name for each in msgspec.structs.fields(type(record)) if each.required]


# -- what a release wrote -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ENTRIES, ids=lambda record: type(record).__name__)
def test_entries_that_an_earlier_release_wrote_are_read(record: msgspec.Struct) -> None:
    stored = STORED["entries"][type(record).__name__]
    assert from_entry(type(record), {name.encode(): text.encode() for name, text in stored.items()}) == record


@pytest.mark.parametrize("record", FIELDS, ids=lambda record: type(record).__name__)
def test_fields_that_an_earlier_release_wrote_are_read(record: msgspec.Struct) -> None:
    assert from_json(type(record), STORED["fields"][type(record).__name__].encode()) == record


def test_groups_and_lineages_that_an_earlier_release_wrote_are_read() -> None:
    assert from_record(base64.b64decode(STORED["binary"]["Lineage"])) == LINEAGE
    kept = from_blob(base64.b64decode(STORED["binary"]["Group"]))
    assert (kept.gid, kept.v_min, kept.v_max, kept.versions) == ("1f", 3, 4, VERSIONS)
    kept.versions = None
    assert to_scored(kept) == GROUP
    assert np.array_equal(kept.tokens[0], [1, 2, 2**40])


# -- any other order, more and fewer fields -----------------------------------------------------------------------


@whatever_the_load
@given(record=entries, more=st.dictionaries(names, anything, max_size=3), seed=st.integers(0, 99))
def test_an_entry_is_read_in_any_order_and_beside_unknown_fields(
    record: msgspec.Struct, more: dict[str, bytes], seed: int
) -> None:
    items = [(name.encode(), text.encode()) for name, text in to_entry(record).items()]
    items += [(name.encode(), value) for name, value in more.items() if value.isascii()]
    random.Random(seed).shuffle(items)
    assert from_entry(type(record), dict(items)) == record


@whatever_the_load
@given(record=entries, data=st.data())
def test_an_entry_that_lacks_what_is_needed_is_passed_over(record: msgspec.Struct, data: st.DataObject) -> None:
    lacking = {name.encode(): text.encode() for name, text in to_entry(record).items()}
    missing = data.draw(st.sampled_from(sorted(to_entry(record))))
    del lacking[missing.encode()]
    found = read_entries(type(record), [(b"1-0", lacking)])
    assert bool(found) is (missing not in needed(record))


@whatever_the_load
@given(record=entries, data=st.data())
def test_no_value_of_an_entry_raises_anything_but_unreadable(record: msgspec.Struct, data: st.DataObject) -> None:
    spoilt = {name.encode(): text.encode() for name, text in to_entry(record).items()}
    spoilt[data.draw(st.sampled_from(sorted(spoilt)))] = data.draw(anything)
    assert len(read_entries(type(record), [(b"1-0", spoilt)])) <= 1


@whatever_the_load
@given(record=fields, more=st.dictionaries(names, st.none() | st.integers() | names, max_size=3), data=st.data())
def test_a_field_of_a_hash_is_read_likewise(record: msgspec.Struct, more: dict[str, Any], data: st.DataObject) -> None:
    values = {**more, **dict(reversed(msgspec.to_builtins(record).items()))}
    assert read_json(type(record), json.dumps(values, indent=1).encode()) == record
    missing = data.draw(st.sampled_from(sorted(msgspec.to_builtins(record))))
    del values[missing]
    assert (read_json(type(record), json.dumps(values).encode()) is None) is (missing in needed(record))


@whatever_the_load
@given(record=fields, raw=anything)
def test_what_is_no_record_counts_as_none(record: msgspec.Struct, raw: bytes) -> None:
    assert read_json(type(record), raw) is None
    if raw:
        with pytest.raises(Unreadable, match=type(record).__name__):
            from_json(type(record), raw)


@whatever_the_load
@given(where=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_spoilt_group_or_lineage_is_told_as_such(where: int, byte: int) -> None:
    blob = bytearray(to_blob(pack(GROUP), "1f", v_min=0, v_max=0))
    blob[where % len(blob)] = byte
    try:
        from_blob(bytes(blob))
    except InvalidGroup as error:
        assert error.field == "body"  # noqa: PT017 - most bytes are data, and any value of theirs is right
    lineage = bytearray(to_record(LINEAGE))
    lineage[where % len(lineage)] = byte
    from_record(bytes(lineage))


# -- in a running run ---------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    "entry",
    [
        {"gid": "x"},
        {"foo": "bar"},
        {"gid": "x", "env": "0", "n": "two", "tok": "6", "v_min": "0", "v_max": "0", "bytes": "9"},
    ],
    ids=["nothing but an id", "no field of ours", "words for numbers"],
)
async def test_an_unreadable_group_leaves_the_queue_and_the_others_are_trained(
    broker: Broker, entry: dict[str, str]
) -> None:
    await broker.queue.subscribe("main")
    await broker.redis.xadd(broker.keys.groups, entry)
    await put(broker, 1, 2)
    lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert lease is not None
    assert lease.batch.gids == ("g1", "g2")
    assert await broker.redis.xlen(broker.keys.groups) == 0
    reasons = [(letter.entry.gid, letter.entry.reason) for letter in await broker.dead.accepted()]
    assert reasons == ([("x", "unreadable")] if "gid" in entry else [])
    status = await broker.queue.status()
    assert (status.groups, status.sequences, status.waiting) == (0, 0, {})


@pytest.mark.anyio
async def test_a_batch_that_lost_its_groups_is_passed_over(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2, 3, 4)
    assert await broker.queue.form(4) == 1
    [(_, fields)] = await broker.redis.xrange(broker.keys.batches)
    await broker.redis.xadd(broker.keys.batches, {**fields, b"gids": b""}, id="2-0")
    await broker.redis.hset(broker.keys.state, "formed", 2)
    for step in (1, 3):
        lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
        assert lease is not None
        assert lease.batch.step == step
        await broker.queue.commit("main", lease, trained(lease.batch))


@pytest.mark.anyio
@pytest.mark.parametrize("field", ["n", "tok", "formed_at", "v_min"])
async def test_an_unreadable_batch_is_taken_apart_and_its_groups_are_trained(broker: Broker, field: str) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2, 3)
    assert await broker.queue.form(4) == 1
    [(_, fields)] = await broker.redis.xrange(broker.keys.batches)
    del fields[field.encode()]
    await broker.redis.xtrim(broker.keys.batches, maxlen=0, approximate=False)
    await broker.redis.xadd(broker.keys.batches, fields, id="2-0")
    await broker.redis.hset(broker.keys.state, "formed", 2)
    lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert lease is not None
    assert (lease.batch.step, lease.batch.gids) == (3, ("g1", "g2"))
    assert (await broker.queue.status()).groups == 1
    assert (await audit(broker)).findings == []


@pytest.mark.anyio
@pytest.mark.parametrize("lent_before", [False, True])
async def test_batches_that_were_written_by_hand_are_left_out(broker: Broker, lent_before: bool) -> None:
    """Under the id of a time, as XADD makes it: no step is so late, and none is to go on from there."""
    queue, keys = broker.queue, broker.keys
    await queue.subscribe("main")
    await queue.subscribe("other")
    await put(broker, *range(1, 7))
    assert await queue.form(4) == 1
    first = await queue.lease("main", "a", lapse_s=600)
    [(_, batch)] = await broker.redis.xrange(keys.batches)
    for fields in ({"written": "by hand"}, batch):
        await broker.redis.xadd(keys.batches, fields)
    if lent_before:  # by hand, too
        await broker.redis.xreadgroup("main", "b", {keys.batches: ">"}, count=2)
    second = await queue.lease_or_form("main", "b", 4, lapse_s=600)
    assert first is not None
    assert second is not None
    assert (second.batch.step, second.batch.gids) == (2, ("g3", "g4"))
    await queue.commit("main", first, trained(first.batch))
    await queue.commit("main", second, trained(second.batch))
    assert await queue.settled("main") == 2
    others = [await queue.lease_or_form("other", "c", 4, lapse_s=0) for _ in range(2)]
    assert [lent and lent.batch.step for lent in others] == [1, 1]
    third = await queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert third is not None
    assert third.batch.step == 3
    assert [entry.step for entry in await queue.batches()] == [1, 2, 3]
    assert (await audit(broker)).findings == []


@pytest.mark.anyio
@pytest.mark.parametrize("formed", [None, "some", "9" * 30, "1e300"])
async def test_steps_go_on_where_their_number_was_spoilt(broker: Broker, formed: str | None) -> None:
    await broker.queue.subscribe("main")
    await put(broker, *range(1, 5))
    assert await broker.queue.form(4) == 1
    if formed is None:
        await broker.redis.hdel(broker.keys.state, "formed")
    else:
        await broker.redis.hset(broker.keys.state, "formed", formed)
    for step in (1, 2):
        lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
        assert lease is not None
        assert lease.batch.step == step
        await broker.queue.commit("main", lease, trained(lease.batch))
    assert await broker.redis.hget(broker.keys.state, "formed") == b"2"


@pytest.mark.anyio
async def test_unreadable_records_fail_no_reader(broker: Broker) -> None:
    keys, redis = broker.keys, broker.redis
    await broker.queue.subscribe("main")
    await put(broker, 1, 2)
    lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert lease is not None
    await broker.queue.commit("main", lease, trained(lease.batch))
    await broker.weights.publish("main", WeightsEntry(1, 1, "file:///v", "0", 1, "BF16", 0))
    await broker.pools.set_rule("p", PoolRule("pin", 1), "0-0")
    for stream in (
        keys.dead,
        keys.refused,
        keys.batches,
        keys.ledger("main"),
        keys.weights("main"),
        keys.rule("p"),
        keys.metrics,
    ):
        await redis.xadd(stream, {"written": "by hand"}, id="1800000000000-0")
    for hash_ in (keys.envs, keys.pools, keys.tokens):
        await redis.hset(hash_, "7", '{"written": "by hand"}')
    await redis.hset(keys.trainers, "config", '{"batch_size": 4}')
    await redis.hset(keys.state, mapping={"archiver": "{}", "waiting:0": "1", "dead": "some"})
    await redis.hset(keys.settings, mapping={"shadow:other": "lossless, please"})
    await redis.hset(keys.state, mapping={"max_lag": "few", "covered:other": "all"})

    assert [entry.step async for entry in broker.queue.ledger("main")] == [1]
    assert (await broker.queue.newest_committed("main")) is not None
    newest = await broker.weights.newest("main")
    assert newest is not None
    assert newest.version == 1
    orders = await broker.pools.orders("p", "main")
    assert (orders.rule.mode, orders.newest) == ("pin", newest)
    await broker.pools.wait_for_orders("p", "main", orders, 0.01)
    assert await broker.weights.wait_newer("main", 1, 0.01) is None
    assert await broker.dead.all() == []
    assert await broker.registry.trainer_config() is None
    assert await broker.registry.envs() == []
    assert await broker.registry.env(7) is None
    assert await broker.registry.servers() == []
    assert [token.revoked_at for token in await broker.tokens.all()] == [0.0]  # the run does not become open
    assert await broker.queue.retention.archiver() is None
    assert await broker.queue.retention.readers() == {"main": 0}
    assert (await broker.queue.retention.kept()).keep_bytes == 0
    assert await broker.queue.staleness.rule() == (0, 0)
    assert (await broker.queue.status()).dead == 0
    assert [reading.policy for reading in await broker.queue.shadows.readings()] == ["main"]
    assert await broker.journal.newest(5, {"step"}) == ("1800000000000-0", [])
    assert (await audit(broker)).steps == 1
    assert await broker.queue.retire("main", 1) == 1


@pytest.mark.anyio
async def test_a_trained_step_without_its_groups_is_told_by_its_batch(broker: Broker) -> None:
    await broker.queue.subscribe("main")
    await put(broker, 1, 2)
    lease = await broker.queue.lease_or_form("main", "a", 4, lapse_s=600)
    assert lease is not None
    await broker.queue.commit("main", lease, trained(lease.batch))
    [(id_, _)] = await broker.redis.xrange(broker.keys.ledger("main"))
    for fields in ({"loss": "0.5"}, {"gids": "g1 g2"}):
        await broker.redis.delete(broker.keys.ledger("main"))
        await broker.redis.xadd(broker.keys.ledger("main"), fields, id=id_)
        assert [(entry.step, entry.gids) async for entry in broker.queue.ledger("main")] == [(1, ("g1", "g2"))]


@pytest.mark.anyio
async def test_environments_register_where_their_numbers_were_spoilt(broker: Broker) -> None:
    for number in range(2):
        assert (await broker.registry.register_env(ENV, f"{number}")).env_id == number
    for field in ("count", "name:sums", "named:sums"):
        await broker.redis.hset(broker.keys.envs, field, "some")
    found = [await broker.registry.register_env(ENV, f"{number}") for number in (2, 3)]
    assert [(env.env_id, env.name) for env in found] == [(2, "sums_2"), (3, "sums_3")]


@pytest.mark.anyio
async def test_a_servers_report_of_another_version_beside_ours(broker: Broker) -> None:
    status = ServerStatus("s", "p", "http://s", "ready", 3, -1, 0.0)
    await broker.registry.report(status)
    await broker.redis.hset(
        broker.keys.pools, "newer", msgspec.json.encode({**msgspec.to_builtins(status), "gpu": "H300"})
    )
    assert await broker.registry.servers() == [status, status]


@pytest.mark.anyio
async def test_a_token_of_another_version_lets_nobody_in(broker: Broker) -> None:
    raw = {**msgspec.to_builtins(TokenRecord("t", "admin", "00", 1.0)), "role": "auditor"}
    await broker.redis.hset(broker.keys.tokens, "t", msgspec.json.encode(raw))
    [record] = await broker.tokens.all()
    assert record.revoked_at is not None


@pytest.mark.anyio
async def test_a_group_of_an_earlier_release_is_queued_as_before(broker: Broker) -> None:
    """Its entry says nothing of the longest sequence."""
    entry = GroupEntry(gid="g1", env="0", n=2, tok=6, v_min=0, v_max=0, bytes=1)
    await broker.queue.put("g1", group(1), v_min=0, v_max=0)
    [(id_, _)] = await broker.redis.xrange(broker.keys.groups)
    await broker.redis.xdel(broker.keys.groups, id_)
    earlier = {name: text for name, text in to_entry(entry).items() if name != "longest"}
    await broker.redis.xadd(broker.keys.groups, earlier)
    assert await broker.queue.form(2) == 1


def test_trainer_configs_differ_by_content_not_by_text() -> None:
    config = next(record for record in FIELDS if isinstance(record, TrainerConfig))
    text = json.dumps(dict(reversed(msgspec.to_builtins(config).items())), indent=2)
    assert read_json(TrainerConfig, text.encode()) == config

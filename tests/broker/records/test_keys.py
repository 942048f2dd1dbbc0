"""docs/keys.md lists every key there is, with its type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from replicas import replicas_at_work
from scored import group, trained

from lachesis.broker import Broker, ConfigurationError
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.groups import Lineage
from lachesis.broker.records.keys import RUNS, Keys
from lachesis.broker.records.registrations import EnvConfig, TrainerConfig
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry

DOCUMENT = Path(__file__).parents[3] / "docs" / "keys.md"
ROW = re.compile(r"^\| `…:([^`]+)` \| (\w+)", re.M)


def documented() -> dict[str, str]:
    return dict(ROW.findall(DOCUMENT.read_text()))


def test_the_page_lists_exactly_the_names_in_the_code() -> None:
    keys, names = Keys(), set()
    for name in (name for name in vars(Keys) if not name.startswith("_") and name != "run"):
        value = getattr(keys, name)
        text = value if isinstance(value, str) else value("<x>")
        names.add(text.removeprefix("lachesis:{default}:"))
    assert f"`{RUNS}`" in DOCUMENT.read_text()
    assert names == {re.sub(r"<\w+>", "<x>", name) for name in documented()}


@pytest.mark.anyio
async def test_a_run_makes_only_listed_keys_of_the_listed_types(broker: Broker) -> None:
    queue, registry = broker.queue, broker.registry
    await registry.register_trainer(TrainerConfig("g", "p", 2, 16, "", 1, 0, 1))
    await registry.start()
    await registry.register_env(EnvConfig(16, "sums", 1.0, 2), "nonce")
    await registry.report(ServerStatus("s", "main", "http://s", "ready", 0, -1, 0.0))
    assert await broker.pools.set_rule("main", PoolRule("pin", 1), (await broker.pools.rule("main"))[0])
    assert await broker.pools.take_turn("main", "s", 1, 60)
    for max_bytes in (1 << 20, 1):  # the second makes the first old
        await broker.lineage.record([(tokens_digest([1, 2]), Lineage(0, 0, ((0, 0, 1),)))], max_bytes=max_bytes)
    await broker.weights.publish("main", WeightsEntry(0, 0, "file:///v0", "0", 1, "BF16", -1))
    await broker.journal.metric("step", {"reward": 0.5})
    await broker.journal.control("register", "test")
    await registry.writer("main", ttl_s=60).acquire()
    await broker.tokens.create("admin")
    await broker.checkpoints.add("main", "0" * 64, 1)
    await queue.retention.keep(1 << 20)
    await queue.keep_refused("bad", b"{}", "invalid", "test")
    for number in range(6):
        await queue.put(f"g{number}", group(number), v_min=0, v_max=0)
    await queue.subscribe("main")
    for _ in range(2):
        await queue.lease_or_form("main", "c", 2, lapse_s=60, max_deliveries=1)
    lease = await queue.lease_or_form("main", "c", 2, lapse_s=60)
    assert lease is not None
    await queue.commit("main", lease, trained(lease.batch))
    await replicas_at_work(broker)

    prefix = broker.keys.groups.removesuffix("groups")
    page = {re.compile(re.sub(r"<\w+>", ".+", name)): kind for name, kind in documented().items()}
    unseen = set(page)
    async for key in broker.redis.scan_iter(match=prefix + "*"):
        name, kind = key.decode().removeprefix(prefix), (await broker.redis.type(key)).decode()
        pattern = next((pattern for pattern in page if pattern.fullmatch(name)), None)
        assert pattern is not None, f"{name} is not in docs/keys.md"
        assert kind == page[pattern], name
        unseen.discard(pattern)
    assert not unseen


@pytest.mark.parametrize("run", ["", "a b", "a{b}", "a:b", "-a", "x" * 65, "a\n"])
def test_names_that_would_break_a_key_are_refused(run: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^run = "):
        Keys(run)


def test_one_run_is_one_cluster_slot() -> None:
    keys = Keys("x")
    assert keys.groups == "lachesis:{x}:groups"
    assert keys.blob("g") == "lachesis:{x}:blob:g"

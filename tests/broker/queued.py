"""Groups in the queue, and batches lent: what tests of the scripts begin with."""

from __future__ import annotations

from scored import group

from lachesis.broker import Broker
from lachesis.broker.records.registrations import EnvConfig
from lachesis.broker.records.steps import Lease

ENV = EnvConfig(max_token_length=16, desired_name="sums", weight=1.0, group_size=2)


async def put(broker: Broker, *numbers: int, size: int = 2) -> None:
    for number in numbers:
        assert await broker.queue.put(f"g{number}", group(number, size), v_min=0, v_max=0) == "stored"


async def lease(broker: Broker, consumer: str = "a", batch_size: int = 4, lapse_s: float = 600) -> Lease:
    await broker.queue.subscribe("main")
    found = await broker.queue.lease_or_form("main", consumer, batch_size, lapse_s=lapse_s)
    assert found is not None
    return found


async def dead(broker: Broker) -> list[tuple[str, str, int, str]]:
    letters = [letter.entry for letter in await broker.dead.accepted()]
    return [(entry.gid, entry.reason, entry.deliveries, entry.detail) for entry in letters]

"""Replicas of the policy `main`, as the tests of their scripts need them."""

from __future__ import annotations

from lachesis.broker import Broker
from lachesis.broker.records.steps import Membership
from lachesis.broker.replicas.members import CONSUMER

BATCH = 4  # sequences


async def founded(broker: Broker, id_: str = "a") -> Membership:
    """The only replica of a new generation, at the end of the ledger."""
    lock = broker.registry.writer("main", ttl_s=60)
    await broker.redis.delete(lock.name)
    assert await lock.acquire(blocking=False)
    newest = await broker.queue.newest_committed("main")
    token = lock.local.token.decode()
    me = await broker.members.start_generation("main", id_, token=token, step=newest.step if newest else 0, hold_s=60)
    assert me is not None
    return me


async def lent(broker: Broker, batch_size: int = BATCH) -> int:
    """The step of a batch that is lent to the replicas."""
    await broker.queue.subscribe("main")
    lease = await broker.queue.lease_or_form("main", CONSUMER, batch_size, lapse_s=60)
    assert lease is not None
    return lease.batch.step


async def opened(broker: Broker, batch_size: int = BATCH) -> Membership:
    """A replica alone, and a step open for it."""
    me = await founded(broker)
    assert await broker.members.open_step(me, await lent(broker, batch_size))
    return me


async def replicas_at_work(broker: Broker) -> None:
    """Makes every key that replicas have."""
    me = await opened(broker)
    assert await broker.members.rendezvous(me) is not None

"""The writer lock and the lease stay alive while the main thread is busy, and their loss is noticed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from trainer_kit import fill, until

from lachesis.broker import BlockingBroker, LeaseLost
from lachesis.trainer.writer_lock import WriterLease

pytestmark = pytest.mark.slow

TTL_S = 3.0


def never() -> bool:
    return False


def held(writer_lease: WriterLease) -> bool:
    return writer_lease.wait(unless=never, on_standby=lambda: None)


def key(blocking: BlockingBroker) -> str:
    return blocking.broker.keys.writer("main")


def test_lock_and_lease_outlive_their_terms(blocking: BlockingBroker) -> None:
    broker = blocking.broker

    def pending() -> dict[str, Any]:
        (found,) = blocking.call(broker.redis.xpending_range, broker.keys.batches, "main", "-", "+", 1)
        return dict(found)

    def ends_at() -> int:
        return int(blocking.call(broker.redis.pexpiretime, key(blocking)))

    idle = 0

    def lease_begins_anew() -> bool:
        nonlocal idle
        before, idle = idle, pending()["time_since_delivered"]
        return bool(idle < before)

    blocking.call(fill, broker, groups=1)
    blocking.call(broker.queue.subscribe, "main")
    with WriterLease(blocking, "main", ttl_s=TTL_S) as writer_lease:
        assert held(writer_lease)
        writer_lease.lease = blocking.call(broker.queue.lease_or_form, "main", "a", 4, lapse_s=0)
        first_end = ends_at()
        for _ in range(2):  # nothing in this thread calls the tenure meanwhile
            until(lease_begins_anew)
        assert ends_at() > first_end
        writer_lease.check()
        assert blocking.call(broker.redis.get, key(blocking)).decode() == writer_lease.token
        assert pending()["times_delivered"] == 1
    assert blocking.call(broker.redis.get, key(blocking)) is None


def test_the_second_waits_for_the_first(blocking: BlockingBroker) -> None:
    standby = threading.Event()
    with WriterLease(blocking, "main", ttl_s=TTL_S) as first:
        assert held(first)  # before the second asks, which may else be faster
        with WriterLease(blocking, "main", ttl_s=TTL_S) as second:
            assert second.wait(unless=standby.is_set, on_standby=standby.set) is False
            first.__exit__(None, None, None)
            assert held(second)


def test_losing_the_lock_is_noticed_and_leaves_the_other_its_own(blocking: BlockingBroker) -> None:
    def lost() -> bool:
        try:
            writer_lease.check()
        except LeaseLost as error:
            return "right to write policy 'main'" in str(error)
        return False

    with WriterLease(blocking, "main", ttl_s=TTL_S) as writer_lease:
        assert held(writer_lease)
        blocking.call(blocking.broker.redis.set, key(blocking), "another")
        until(lost)
    assert blocking.call(blocking.broker.redis.get, key(blocking)) == b"another"

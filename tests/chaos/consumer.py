"""A native trainer without a model, as its own process, to be killed: leases, checks, commits, frees.

`python consumer.py URL NAME BATCH_SIZE LAPSE_S`
"""

from __future__ import annotations

import random
import sys
import time

from redis.exceptions import RedisError

from lachesis.broker import BlockingBroker, LeaseLost, connect_blocking
from lachesis.broker.errors import RedisUnreachable
from lachesis.broker.records.steps import LedgerEntry

POLICY = "main"


def train(blocking: BlockingBroker, name: str, batch_size: int, lapse_s: float) -> None:
    """One batch, if there is one."""
    queue, call = blocking.broker.queue, blocking.call
    lease = call(queue.lease_or_form, POLICY, name, batch_size, lapse_s=lapse_s)
    if lease is None:
        call(queue.wait_for_group, 0.2)
        return
    batch = lease.batch
    groups = call(queue.fetch, batch.gids)
    assert tuple(group.gid for group in groups) == batch.gids
    assert sum(len(group.tokens) for group in groups) == batch.n == batch_size, batch
    time.sleep(random.uniform(0, 0.05))
    entry = LedgerEntry(
        step=batch.step, gids=batch.gids, n=batch.n, tok=batch.tok, v_before=0, v_after=0, v_min=0, lag=0,
        replica=name, reward=0.0, loss=0.0, seconds=0.0,
    )  # fmt: skip
    call(queue.commit, POLICY, lease, entry)
    call(queue.retire, POLICY, call(queue.settled, POLICY))


def main() -> None:
    url, name, batch_size, lapse_s = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    while True:
        try:
            with connect_blocking(url) as blocking:
                blocking.call(blocking.broker.queue.subscribe, POLICY)
                while True:
                    try:
                        train(blocking, name, batch_size, lapse_s)
                    except (LeaseLost, LookupError) as error:  # too slow: another trainer took it, and freed it
                        print(f"{name}: {error}", flush=True)
        except (RedisError, RedisUnreachable, OSError) as error:
            print(f"{name}: {error}", flush=True)
            time.sleep(0.1)


if __name__ == "__main__":
    main()

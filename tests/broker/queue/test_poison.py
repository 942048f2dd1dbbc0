"""Trainers that a batch kills, by SIGKILL, and decisions about dead letters that are cut short: nothing is lost or doubled."""

from __future__ import annotations

import signal
import time

import pytest
from commands import python
from scored import group
from warm import WarmProcess

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.records.groups import Limits
from lachesis.broker.records.versions import WeightsEntry

pytestmark = pytest.mark.anyio
GROUPS, BATCH, MAX_DELIVERIES = 24, 4, 3
POISON = 7  # the group that kills who trains it

TRAINER = """
import os, signal, sys
from lachesis.broker import connect_blocking
from lachesis.broker.records.steps import LedgerEntry

with connect_blocking(sys.argv[1], sys.argv[2]) as blocking:
    queue, call = blocking.broker.queue, blocking.call
    call(queue.subscribe, "main")
    while lease := call(queue.lease_or_form, "main", sys.argv[3], 4, lapse_s=0, max_deliveries=3):
        batch = lease.batch
        if any(group.tokens[0][1] == 7 for group in call(queue.fetch, batch.gids)):
            os.kill(os.getpid(), signal.SIGKILL)
        entry = LedgerEntry(batch.step, batch.gids, batch.n, batch.tok, 0, 0, 0, 0, sys.argv[3], 0.0, 0.0, 0.0)
        call(queue.commit, "main", lease, entry)
"""


def run(*arguments: str) -> int:
    return python.run(*arguments, timeout=120).returncode


def start(*arguments: str) -> WarmProcess:
    return python.start(*arguments)


async def test_a_batch_that_kills_its_trainers_is_given_up_and_all_others_are_trained(broker: Broker) -> None:
    for number in range(GROUPS):
        stale = number % 6 == 5
        reply = await broker.queue.put(
            f"g{number}", group(number), v_min=0 if stale else 8, v_max=8, limits=Limits(max_lag=4)
        )
        assert reply == "stored"
    await broker.weights.publish("main", WeightsEntry(8, 8, "file:///v", "0", 1, "BF16", -1))
    codes: list[int] = []
    while not codes or codes[-1]:
        codes.append(run("-c", TRAINER, broker.url, broker.keys.run, f"t{len(codes)}"))
    assert codes == [-signal.SIGKILL] * MAX_DELIVERIES + [0]
    report = await audit(broker)
    assert report.findings == []
    assert (report.dead, report.trained, report.queued) == (
        3 + 2,
        GROUPS - 6,
        1,
    )  # the last stale group is alone: no batch asks for it
    status = await broker.queue.status()
    assert status.dropped == {"stale": 3, "deliveries": 2}
    assert f"g{POISON}" in {letter.entry.gid for letter in await broker.dead.accepted()}


@pytest.mark.parametrize("action", ["requeue", "purge"])
async def test_a_decision_killed_halfway_can_be_made_again(broker: Broker, action: str) -> None:
    """Refused posts are put in one step and taken from the dead letters in another; accepted groups change in one."""
    posts = 300
    for number in range(posts):
        body = b'{"tokens":[[1,%d]],"masks":[[1,%d]],"scores":[0.0]}' % (number, number)
        await broker.queue.keep_refused(f"refused-p{number}", body, "invalid", "masks: a rule of an earlier trainer")
        await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0, limits=Limits(max_lag=1))
    await broker.weights.publish("main", WeightsEntry(8, 8, "file:///v", "0", 1, "BF16", -1))
    assert await broker.queue.form(BATCH) is None
    await broker.queue.put("last", group(999), v_min=8, v_max=8, limits=Limits(max_lag=0))
    assert len(await broker.dead.all()) == 2 * posts

    where = ("--redis-url", broker.url, "--run", broker.keys.run)
    command = ("-m", "lachesis.cli.main", "dead", action, "--all", *where)
    process = start(*command)
    deadline = time.monotonic() + 60
    while len(await broker.dead.all()) > 2 * posts - 50:
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.kill()
    process.wait()
    assert await broker.dead.all() != []
    assert (await audit(broker)).findings == []
    assert run(*command) == 0
    report = await audit(broker)
    assert report.findings == []
    assert await broker.dead.all() == []
    if action == "requeue":
        assert (report.accepted, report.queued) == (2 * posts + 1, 2 * posts + 1)
    else:
        assert (report.accepted, report.queued, report.purged) == (posts + 1, 1, posts)

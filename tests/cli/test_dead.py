"""`lachesis dead`: what a person does with it, on a real Redis."""

from __future__ import annotations

import json

import pytest
from commands import lachesis
from scored import trained

from lachesis.broker import Broker
from lachesis.broker.audit import audit
from lachesis.broker.records.groups import Limits, ScoredGroup
from lachesis.broker.records.registrations import TrainerConfig
from lachesis.broker.records.versions import WeightsEntry
from lachesis.broker.retention.dead_letters import REASONS, untrainable

pytestmark = pytest.mark.anyio
BODY = b'{"tokens":[[1,2,3]],"masks":[[-100,2,3]],"scores":[1.0],"env_id":4}'


def group(number: int) -> ScoredGroup:
    return ScoredGroup(tokens=[[1, 2], [1, number]], masks=[[-100, 2], [-100, number]], scores=[0.0, 1.5], env_id=3)


@pytest.fixture
async def where(broker: Broker) -> tuple[str, ...]:
    """A run with two stale groups (g0, g1), a batch that was lent too often (g2, g3), and a refused post."""
    for number in range(4):
        await broker.queue.put(f"g{number}", group(number), v_min=9 * (number > 1), v_max=9, limits=Limits(max_lag=5))
    await broker.weights.publish("main", WeightsEntry(9, 9, "file:///v", "0", 1, "BF16", -1))
    await broker.queue.subscribe("main")
    for _ in range(2):
        await broker.queue.lease_or_form("main", "t", 4, lapse_s=0, max_deliveries=1)
    await broker.queue.keep_refused("refused-p", BODY, "invalid", "tokens[0] = '3 tokens': must not exceed 2")
    return ("--redis-url", broker.url, "--run", broker.keys.run)


async def test_they_are_listed_and_shown(where: tuple[str, ...]) -> None:
    lines = lachesis("dead", "list", *where).stdout.splitlines()
    assert [line.split()[:2] for line in lines if line[0] != " "] == [
        ["g0", "stale"], ["g1", "stale"], ["g2", "deliveries"], ["g3", "deliveries"], ["refused-p", "invalid"],
    ]  # fmt: skip
    (letter, _) = json.loads(lachesis("dead", "list", "--json", "--reason", "deliveries", *where).stdout)
    assert (letter["id"], letter["deliveries"], letter["accepted"]) == ("g2", 1, True)
    assert letter["detail"] == "step 1 was lent 1 times and never committed"
    assert "no dead letters with that reason" in lachesis("dead", "list", "--reason", "untrainable", *where).stdout

    shown = lachesis("dead", "show", "g1", *where).stdout
    assert "reason      stale" in shown
    assert "environment 3, versions 0 to 9" in shown
    assert "sequence 1  score 1.5, 2 tokens, 1 of them trained" in shown
    assert "\n  1 2\n" not in shown
    assert "\n  1 2\n" in lachesis("dead", "show", "g1", "--tokens", *where).stdout
    assert json.loads(lachesis("dead", "show", "g1", "--json", *where).stdout)["group"]["tokens"] == [[1, 2], [1, 1]]
    assert json.loads(lachesis("dead", "show", "refused-p", "--json", *where).stdout)["body"] == BODY.decode()
    assert BODY.decode() in lachesis("dead", "show", "refused-p", *where).stdout


async def test_they_are_put_back_unless_that_would_be_in_vain(broker: Broker, where: tuple[str, ...]) -> None:
    done = lachesis("dead", "requeue", "g2", "g3", *where)
    assert (done.returncode, done.stdout) == (0, "g2: requeued\ng3: requeued\n")
    assert [entry.gid for _, entry in await broker.queue.queued()] == ["g2", "g3"]

    await broker.registry.register_trainer(TrainerConfig("g", "p", 4, 2, "", 1, 0, 1))
    done = lachesis("dead", "requeue", "--all", *where)
    assert done.returncode == 1
    stale, _, refused = done.stdout.splitlines()
    assert stale.startswith("g0: not requeued: version 0 is 9 behind, and max_lag is 5")
    assert refused.startswith("refused-p: not requeued: still refused: tokens[0] = '3 tokens': must not exceed")

    await broker.registry.register_trainer(TrainerConfig("g", "p", 4, 3, "", 1, 0, 1))
    for _ in range(2):
        done = lachesis("dead", "requeue", "--all", "--reason", "invalid", *where)
        assert done.returncode == 0
    (_, posted) = (await broker.queue.queued())[-1]
    assert (posted.gid, posted.env, posted.tok) == ("p", "4", 3)
    assert [letter.entry.gid for letter in await broker.dead.all()] == ["g0", "g1"]
    report = await audit(broker)
    assert report.findings == []
    assert (report.accepted, report.queued, report.dead, report.purged) == (5, 3, 2, 0)


async def test_a_sequence_that_its_group_was_trained_without_can_only_be_looked_at(broker: Broker) -> None:
    where = ("--redis-url", broker.url, "--run", broker.keys.run)
    for number in range(2):
        await broker.queue.put(f"g{number}", group(number), v_min=0, v_max=0)
    await broker.queue.subscribe("main")
    lease = await broker.queue.lease_or_form("main", "t", 4, lapse_s=0)
    assert lease is not None
    letter = untrainable("g1", 1, "token id 9: must be below 8")
    await broker.queue.commit("main", lease, trained(lease.batch), untrainable=[letter])
    listed = lachesis("dead", "list", *where).stdout
    assert listed.split()[:2] == ["g1/1", "untrainable"]
    shown = lachesis("dead", "show", "g1/1", *where).stdout
    assert "sequence 1  score 1.5, 2 tokens" in shown
    assert "sequence 0" not in shown
    done = lachesis("dead", "requeue", "g1/1", *where)
    assert (done.returncode, done.stdout) == (1, "g1/1: not requeued: the rest of its group was trained without it\n")
    assert lachesis("dead", "requeue", "--all", *where).returncode == 0
    assert "1 sequences that their groups were trained without" in lachesis("status", *where).stdout
    assert lachesis("dead", "purge", "--all", *where).stdout == "purged 1 sequences\n"
    assert await broker.queue.fetch(["g1"])  # the group's data is not the letter's


async def test_one_whose_data_is_gone_is_shown_as_that_and_does_not_keep_others(
    broker: Broker, where: tuple[str, ...]
) -> None:
    for number in (4, 5):
        await broker.queue.put(f"g{number}", group(number), v_min=9, v_max=9)
    lease = await broker.queue.lease_or_form("main", "t", 4, lapse_s=0)
    assert lease is not None
    await broker.redis.delete(*map(broker.keys.blob, ("g1", "g4", "refused-p")))
    await broker.redis.set(broker.keys.blob("g0"), b"spoilt")
    await broker.registry.register_trainer(TrainerConfig("g", "p", 4, 3, "", 1, 0, 1))
    await broker.queue.refit("main", apart=[lease.batch.step])
    deleted = "it was deleted by hand"
    expired = "refused posts are kept for a week"
    for gid, reason, says in (
        ("g4", "lost", f"the data of 'g4' is gone: {deleted}"),
        ("g1", "stale", f"the data of 'g1' is gone: {deleted}"),
        ("g0", "stale", "body = 'bytes': must be a stored group"),
        ("refused-p", "invalid", f"the data of 'refused-p' is gone: {expired}"),
    ):
        shown = lachesis("dead", "show", gid, *where)
        assert shown.returncode == 0
        assert f"\nreason      {reason}\n" in f"\n{shown.stdout}"
        assert f"\nnot shown   {says}" in shown.stdout
        told = json.loads(lachesis("dead", "show", gid, "--json", *where).stdout)
        assert (told["id"], told["reason"]) == (gid, reason)
        assert told["not_shown"].startswith(says)

    done = lachesis("dead", "requeue", "--all", *where)
    assert done.returncode == 1
    assert done.stderr == ""
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert {gid: what.partition(":")[0] for gid, what in said.items()} == {
        "g0": "not requeued", "g1": "not requeued", "g2": "requeued", "g3": "requeued", "g4": "not requeued",
        "refused-p": "not requeued",
    }  # fmt: skip
    assert deleted in said["g1"]
    assert expired in said["refused-p"]
    assert [entry.gid for _, entry in await broker.queue.queued()] == ["g5", "g2", "g3"]
    assert lachesis("dead", "purge", "--all", "--reason", "lost", *where).stdout == "purged 1 accepted groups\n"


async def test_each_reason_is_explained_and_may_be_asked_for(where: tuple[str, ...]) -> None:
    usage = lachesis("dead").stdout
    helps = [lachesis("dead", action, "--help").stdout for action in ("list", "requeue", "purge")]
    for reason in REASONS:
        assert f"\n  {reason} " in usage
        assert all(reason in text for text in helps)
        done = lachesis("dead", "list", "--reason", reason, *where)
        assert (done.returncode, done.stderr) == (0, "")


async def test_they_are_given_up(broker: Broker, where: tuple[str, ...]) -> None:
    assert lachesis("dead", "purge", "--all", "--older-than", "1h", *where).stdout == "purged nothing\n"
    assert lachesis("dead", "purge", "g0", *where).stdout == "purged 1 accepted groups\n"
    assert lachesis("dead", "purge", "--all", *where).stdout == "purged 3 accepted groups and 1 refused posts\n"
    assert "has no dead letters" in lachesis("dead", "list", *where).stdout
    told = json.loads(lachesis("audit", "--json", *where).stdout)
    assert (told["clean"], told["accepted"], told["dead"], told["purged"]) == (True, 4, 0, 4)
    assert "4 given up" in lachesis("audit", *where).stdout
    assert not await broker.redis.exists(*(broker.keys.blob(f"g{number}") for number in range(4)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "nothing"], "'nothing' is no dead letter of run"),
        (["purge", "g0", "nothing"], "`lachesis dead list` shows them"),
        (["purge"], "which ones? Give their ids, or --all (not both)"),
        (["requeue", "g0", "--all"], "which ones?"),
        (["purge", "g0", "--reason", "stale"], "choose among --all"),
        (["purge", "--all", "--older-than", "yesterday"], "--older-than = 'yesterday': a number and a unit"),
        (["bury"], "no such action: 'bury'; one of list, show, requeue, purge"),
    ],
)
async def test_mistakes_are_one_clear_line(
    broker: Broker, where: tuple[str, ...], arguments: list[str], says: str
) -> None:
    done = lachesis("dead", *arguments, *where)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert len(await broker.dead.all()) == 5

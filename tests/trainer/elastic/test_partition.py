"""A replica that the network cuts off, and that comes back: the others go on, it joins anew, and not a bit is different.

In network namespaces, where the machine permits them; cut off from Redis alone also by a proxy, which it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_run import SILENT_S, Run, check, step_of
from holding_proxy import HoldingProxy
from network import PORT, Network, forbidden
from trainer_kit import until

from lachesis.broker import EmbeddedRedis, connect_blocking

pytestmark = pytest.mark.verl
NAMES = ("r0", "r1", "lost")


@pytest.fixture
def network() -> Iterator[Network]:
    with Network("redis", *NAMES) as made:
        yield made


@pytest.fixture
def server(network: Network, tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """On the network for replicas, and on a socket for the test."""
    reachable = (f"port {PORT}", "bind 0.0.0.0", "protected-mode no")
    with EmbeddedRedis(tmp_path / "redis", server=network.server(tmp_path), config=reachable) as found:
        yield found


@pytest.mark.skipif(bool(forbidden()), reason=f"no network namespaces here: {forbidden()}")
@pytest.mark.parametrize("cut_from", [("redis",), ("redis", "r0", "r1")], ids=["Redis", "all"])
def test_one_cut_off_from_redis_is_left_out_and_comes_back_as_another(
    server: EmbeddedRedis,
    network: Network,
    make_run: Callable[..., Run],
    undisturbed: list[tuple[int, str]],
    cut_from: tuple[str, ...],
) -> None:
    run = start(server, network, make_run, queued=2)

    def cut() -> None:
        for name in cut_from:
            network.cut("lost", name)

    goes_on_without_it(run, undisturbed, cut, network.heal)


def test_cut_off_by_a_proxy_too(
    shared_redis: EmbeddedRedis,
    run_name: str,
    make_run: Callable[..., Run],
    undisturbed: list[tuple[int, str]],
) -> None:
    run = make_run(shared_redis.url, run_name, compute_s=0.15, silent_s=SILENT_S, queued=2)
    with HoldingProxy(str(shared_redis.socket)) as proxy:
        run.url = proxy.url
        run.start("lost")
        run.url = shared_redis.url
        for name in NAMES[:2]:
            run.start(name)
        until_current(run)
        goes_on_without_it(run, undisturbed, proxy.cut, proxy.heal)


def goes_on_without_it(
    run: Run, expected: list[tuple[int, str]], cut: Callable[[], None], heal: Callable[[], None]
) -> None:
    with connect_blocking(run.url, run.name) as broker:
        cut()
        cut_at = step_of(broker)
        run.queue(run.steps - 1)
        until(lambda: "lost" not in members(run))
        until(lambda: step_of(broker) >= cut_at + 2)  # one step may have been voted for before
        assert "lost" not in members(run)
        assert step_of(broker) < expected[-1][0]
        heal()
        until(lambda: "lost" in members(run))
    run.queue(run.steps)
    check(run, expected, *NAMES)
    assert run.log("lost").count("met ") >= 2


@pytest.mark.skipif(bool(forbidden()), reason=f"no network namespaces here: {forbidden()}")
def test_while_one_does_not_reach_the_others_nothing_is_committed_and_nothing_lost(
    server: EmbeddedRedis,
    network: Network,
    make_run: Callable[..., Run],
    undisturbed: list[tuple[int, str]],
) -> None:
    """All reach Redis, which so can't know whom to leave out."""
    run = start(server, network, make_run, compute_s=0.5)  # in the middle of a step, and long before the last
    for name in ("r0", "r1"):
        network.cut("lost", name)
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: all(member.holds for member in broker.call(broker.broker.members.members, "main")))
        assert "lost" in members(run)
    network.heal()
    check(run, undisturbed, *NAMES)


def start(server: EmbeddedRedis, network: Network, make_run: Callable[..., Run], **settings: Any) -> Run:
    """Three replicas that have found each other."""
    run = make_run(server.url, "partition", **({"compute_s": 0.15, "silent_s": SILENT_S} | settings))
    run.url = f"redis://{network.address('redis')}:{PORT}/0"
    for name in NAMES:
        run.start(name, namespace=network.space(name))
    run.url = server.url
    until_current(run)
    return run


def until_current(run: Run) -> None:
    """Until all three have the newest weights."""
    with connect_blocking(run.url, run.name) as broker:
        until(lambda: [m.step >= 0 for m in broker.call(broker.broker.members.members, "main")] == [True] * 3)


def members(run: Run) -> list[str]:
    with connect_blocking(run.url, run.name) as broker:
        return [member.id.split(":")[0] for member in broker.call(broker.broker.members.members, "main")]

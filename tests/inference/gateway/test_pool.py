"""Which server takes the next request."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lachesis.broker.records.versions import ServerStatus
from lachesis.inference.gateway.pool import LOST_S, NO_NEW_REQUESTS_S, Pool

pytestmark = pytest.mark.anyio


def status(name: str, state: str = "ready", heartbeat: float = 0.0) -> ServerStatus:
    return ServerStatus(
        server=name, pool="main", url=f"http://{name}", state=state, version=1, loading=-1, heartbeat=heartbeat
    )


def names(pool: Pool) -> set[str]:
    return {server.name for server in pool.able()}


@given(calls=st.lists(st.integers(0, 5), min_size=1, max_size=6))
async def test_the_least_busy_server_is_picked(calls: list[int]) -> None:
    pool = Pool()
    pool.refresh([status(f"s{index}") for index in range(len(calls))], now=0, wall=0)
    for server in pool.able():
        server.calls.update(anyio.CancelScope() for _ in range(calls[int(server.name[1:])]))

    picked = pool.pick()

    assert picked is not None
    assert len(picked.calls) == min(calls)


def test_idle_servers_take_turns() -> None:
    pool = Pool()
    pool.refresh([status("a"), status("b"), status("c")], now=0, wall=0)

    picked = [pool.pick() for _ in range(6)]

    assert [server.name for server in picked if server] == ["a", "b", "c", "a", "b", "c"]


def test_only_ready_and_updating_servers_take_requests() -> None:
    pool = Pool()
    states = ("starting", "ready", "updating", "draining", "failed")
    pool.refresh([status(state, state) for state in states], now=0, wall=0)

    assert names(pool) == {"ready", "updating"}


def test_a_silent_server_goes_stale_whatever_its_clock_says() -> None:
    pool = Pool()
    ahead = 1e6  # seconds its clock is ahead of ours
    pool.refresh([status("old", heartbeat=0.0), status("ahead", heartbeat=ahead)], now=0, wall=1000)
    assert names(pool) == set()  # both look dead at first sight

    for second in range(1, 20):
        pool.refresh([status("old"), status("ahead", heartbeat=ahead + second)], now=second, wall=1000 + second)
    assert names(pool) == {"ahead"}

    pool.refresh([status("ahead", heartbeat=ahead + 19)], now=19 + NO_NEW_REQUESTS_S, wall=1100)
    assert names(pool) == set()


def test_nobody_goes_stale_while_redis_is_away() -> None:
    pool = Pool()
    pool.refresh([status("s", heartbeat=1000)], now=0, wall=1000)

    assert names(pool) == {"s"}  # however late it is by now: no refresh has said otherwise


def test_a_server_that_failed_is_trusted_again_after_its_next_heartbeat() -> None:
    pool = Pool()
    pool.refresh([status("s", heartbeat=0)], now=0, wall=0)
    server = pool.pick()
    assert server is not None

    pool.failed(server)
    assert pool.pick() is None
    pool.refresh([status("s", heartbeat=0)], now=0.5, wall=0.5)
    assert pool.pick() is None
    pool.refresh([status("s", heartbeat=1)], now=1, wall=1)
    assert pool.pick() is server


async def test_what_runs_on_a_lost_server_is_cancelled() -> None:
    pool = Pool()
    pool.refresh([status("withdrawn"), status("silent"), status("well")], now=0, wall=0)
    scopes = {server.name: anyio.CancelScope() for server in pool.able()}
    for server in pool.able():
        server.calls.add(scopes[server.name])

    pool.refresh([status("silent"), status("well", heartbeat=1)], now=1, wall=1)
    assert [name for name, scope in scopes.items() if scope.cancel_called] == ["withdrawn"]
    pool.refresh([status("silent"), status("well", heartbeat=2)], now=LOST_S + 1, wall=2)
    assert [name for name, scope in scopes.items() if scope.cancel_called] == ["withdrawn", "silent"]


async def test_a_refresh_wakes_those_who_wait() -> None:
    pool = Pool()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.wait_for_change)
            await anyio.wait_all_tasks_blocked()
            pool.refresh([status("s")], now=0, wall=0)


def test_new_requests_wait_for_a_new_version_for_a_moment_only() -> None:
    pool = Pool()
    pool.refresh([status("a"), status("b")], now=0, wall=0)
    pool.await_version(2, until=1.0)
    assert pool.pick() is None

    newer = structs.replace(status("b", heartbeat=0.5), version=2)
    pool.refresh([status("a", heartbeat=0.5), newer], now=0.5, wall=0.5)
    assert {server.name for server in (pool.pick(), pool.pick()) if server} == {"b"}

    pool.refresh([status("a", heartbeat=1.5), status("b", heartbeat=1.5)], now=1.5, wall=1.5)
    assert {server.name for server in (pool.pick(), pool.pick()) if server} == {"a", "b"}


@pytest.mark.parametrize(("rule", "waits"), [("newest", True), ("pin", False), ("canary", False), ("rest", False)])
def test_requests_wait_for_a_new_version_only_where_the_rule_lets_servers_follow(rule: str, waits: bool) -> None:
    pool = Pool()
    pool.refresh([structs.replace(status("a"), rule=rule), structs.replace(status("b"), rule=rule)], now=0, wall=0)

    pool.await_version(2, until=1)

    assert (pool.pick() is None) is waits


@given(keys=st.sets(st.integers(0, 2**32 - 1), min_size=300, max_size=300))
def test_a_prompt_stays_with_its_server_and_prompts_spread(keys: set[int]) -> None:
    pool = Pool()

    def servers(count: int) -> dict[int, str]:
        pool.refresh([status(f"s{index}") for index in range(count)], now=0, wall=0)
        return {key: server.name for key in keys if (server := pool.pick(key))}

    first, again, more = servers(4), servers(4), servers(5)
    assert first == again
    assert all(list(first.values()).count(f"s{index}") > 25 for index in range(4))
    assert {more[key] for key in keys if more[key] != first[key]} == {"s4"}


async def test_a_prompts_server_that_is_clearly_busier_is_passed_over() -> None:
    pool = Pool()
    pool.refresh([status("a"), status("b")], now=0, wall=0)
    preferred = pool.pick(7)
    assert preferred is not None
    for _ in range(4):
        preferred.calls.add(anyio.CancelScope())
        assert pool.pick(7) is preferred
    preferred.calls.add(anyio.CancelScope())
    assert pool.pick(7) is not preferred


def test_servers_too_far_behind_get_no_requests() -> None:
    def versioned(name: str, version: int) -> ServerStatus:
        return structs.replace(status(name), version=version)

    pool = Pool(max_lag=2)
    pool.refresh([versioned("old", 3), versioned("new", 4)], now=0, wall=0)
    pool.await_version(6, until=0.0)  # nobody waits for the newest itself
    assert {server.name for server in (pool.pick(), pool.pick()) if server} == {"new"}
    pool.await_version(7, until=0.0)
    assert pool.pick() is None
    pool.refresh([versioned("old", 5), versioned("new", 4)], now=1, wall=1)
    assert {server.name for server in (pool.pick(), pool.pick()) if server} == {"old"}

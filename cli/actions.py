"""What commands with several actions share: `lachesis dead list | …`, `lachesis token create | …`, `lachesis pool pin | …`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from redis.exceptions import NoPermissionError

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError, did_you_mean
from lachesis.broker.records.keys import check_name
from lachesis.cli.terminal import say
from lachesis.service.settings import RedisSettings

T = TypeVar("T")
MAIN = "main"  # the policy that the pools serve unless told otherwise


def dispatch(actions: Mapping[str, Callable[[Sequence[str]], int]], usage: str, arguments: Sequence[str]) -> int:
    """Run the action that the first argument names on the others; without one, print the usage."""
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        say(*usage.split("\n"))
        return 0
    if action not in actions:
        one_of = ", ".join(actions)
        raise ConfigurationError(f"no such action: {action!r}; one of {one_of}{did_you_mean(action, actions)}")
    return actions[action](rest)


def with_broker(settings: RedisSettings, operation: Callable[[Broker], Awaitable[T]], *, existing: bool = True) -> T:
    """Connect to the settings' run, and do one thing there.

    Raises ConfigurationError where there is no such run, unless with `existing=False` it may be yet to come.
    """

    async def run(url: str) -> T:
        broker = await Broker.connect(url, settings.run)
        try:
            if existing:
                await check_run(broker)
            return await operation(broker)
        finally:
            await broker.aclose()

    with settings.redis(existing=existing) as url:
        return asyncio.run(run(url))


async def check_run(broker: Broker, setting: str = "--run") -> None:
    """Raise ConfigurationError, naming the runs there are, if this one has left nothing in Redis."""
    try:
        if await broker.exists():
            return
    except NoPermissionError:  # a user of Redis that may see some of a run's keys can't tell
        return
    name, runs = broker.keys.run, await broker.known_runs()
    there = f"there {'is' if len(runs) == 1 else 'are'} {', '.join(runs)}" if runs else "this Redis has none"
    raise ConfigurationError(f"{setting} = {name!r}: no such run; {there}{did_you_mean(name, runs)}")


async def check_policy(broker: Broker, policy: str) -> None:
    """Raise ConfigurationError, naming those there are, for a policy that nobody trains or ever trained."""
    check_name("policy", policy)
    if policy == MAIN or await broker.redis.exists(broker.keys.ledger(policy), broker.keys.weights(policy)):
        return
    known = await broker.queue.readers()
    if policy not in known:
        names = ", ".join(sorted({MAIN, *known}))
        raise ConfigurationError(
            f"--policy = {policy!r}: run {broker.keys.run!r} has no such policy; there are {names}{did_you_mean(policy, known)}"
        )

"""What commands with several actions share: `lachesis dead list | …`, `lachesis token create | …`, `lachesis pool pin | …`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.settings import RedisSettings

T = TypeVar("T")


def dispatch(actions: Mapping[str, Callable[[Sequence[str]], int]], usage: str, arguments: Sequence[str]) -> int:
    """Run the action that the first argument names on the others; without one, print the usage."""
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        print(usage)
        return 0
    if action not in actions:
        raise ConfigurationError(f"no such action: {action!r}; one of {', '.join(actions)}")
    return actions[action](rest)


def with_broker(settings: RedisSettings, operation: Callable[[Broker], Awaitable[T]]) -> T:
    """Connect to the settings' run, and do one thing there."""

    async def run(url: str) -> T:
        broker = await Broker.connect(url, settings.run)
        try:
            return await operation(broker)
        finally:
            await broker.aclose()

    with settings.redis() as url:
        return asyncio.run(run(url))

"""`lachesis pool list | newest | pin | canary | promote | rollback`: which version the servers of a pool serve."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.keys import check_name
from lachesis.broker.pools import NEWEST
from lachesis.broker.records import PoolRule, ServerStatus
from lachesis.broker.settings import RedisSettings
from lachesis.cli.actions import dispatch, with_broker
from lachesis.cli.options import parse

USAGE = """\
usage: lachesis pool list [--json]
       lachesis pool newest
       lachesis pool pin VERSION
       lachesis pool canary VERSION [--share 0.25]
       lachesis pool promote
       lachesis pool rollback

Which published version the servers of a pool serve:
  newest      the newest one, as soon as it is published (what a pool does that was never told otherwise)
  pin         this version and no other, older ones too; 0 is the base model
  canary      this version on a share of the servers; the others stay at the version that the pool has now
  promote     the canary's version everywhere: pins the pool to it
  rollback    the others' version everywhere: pins the pool to it
Every action takes --pool, --redis-url and --run; `lachesis pool pin --help` explains them. docs/inference.md says more."""

STALE_S = 10.0  # a heartbeat older than this is a dead server's


class PoolSettings(RedisSettings):
    """Show which version each pool's servers are to serve, and which they do."""

    pool: str = Field("main", description="the pool")
    json_output: bool = Field(False, alias="json", description="print one JSON array")


class SteerSettings(RedisSettings):
    """Tell a pool which version to serve; its servers follow at once."""

    pool: str = Field("main", description="the pool")
    policy: str = Field("main", description="the policy whose versions the pool serves")


class PinSettings(SteerSettings):
    """Have all servers of a pool serve one published version, newer or older than what they serve now."""

    version: CliPositionalArg[int] = Field(ge=0, description="the version; 0 is the base model")


class CanarySettings(PinSettings):
    """Have a share of a pool's servers serve another version; the others stay where the pool is now."""

    share: float = Field(
        0.25, gt=0, lt=1, description="share of the servers; at least one is, and at least one is not, a canary"
    )


def main(arguments: Sequence[str]) -> int:
    return dispatch(ACTIONS, USAGE, arguments)


def list_(arguments: Sequence[str]) -> int:
    settings = parse(PoolSettings, "pool list", arguments)
    check_name("pool", settings.pool)

    async def run(broker: Broker) -> int:
        servers = sorted(await broker.parties.servers(), key=lambda status: status.server)
        pools = sorted({settings.pool, *(status.pool for status in servers)})
        found = [
            (pool, (await broker.pools.rule(pool))[1], [status for status in servers if status.pool == pool])
            for pool in pools
        ]
        if settings.json_output:
            rows = [{"pool": pool, "rule": rule, "servers": servers} for pool, rule, servers in found]
            print(msgspec.json.encode(rows).decode())
        else:
            _show(found)
        return 0

    return with_broker(settings, run)


def newest(arguments: Sequence[str]) -> int:
    return _steer(parse(SteerSettings, "pool newest", arguments), lambda *_: _rule(NEWEST))


def pin(arguments: Sequence[str]) -> int:
    settings = parse(PinSettings, "pool pin", arguments)

    async def rule(broker: Broker, now: PoolRule) -> PoolRule:
        await _check_published(broker, settings.policy, settings.version)
        return PoolRule("pin", settings.version)

    return _steer(settings, rule)


def canary(arguments: Sequence[str]) -> int:
    settings = parse(CanarySettings, "pool canary", arguments)

    async def rule(broker: Broker, now: PoolRule) -> PoolRule:
        await _check_published(broker, settings.policy, settings.version)
        rest = {"pin": now.version, "canary": now.rest}.get(now.mode, -1)
        if now.mode == "newest":
            published = await broker.weights.newest(settings.policy)
            if published is not None:
                rest = published.version if published.version != settings.version else published.parent
        if rest < 0 or rest == settings.version:
            raise ConfigurationError(
                f"version = {settings.version}: pool {settings.pool!r} has no other version that the rest could stay at; "
                "pin it to one first"
            )
        return PoolRule("canary", settings.version, rest, settings.share)

    return _steer(settings, rule)


def promote(arguments: Sequence[str]) -> int:
    settings = parse(SteerSettings, "pool promote", arguments)
    return _steer(settings, lambda _, now: _rule(PoolRule("pin", _canary(settings.pool, now).version)))


def rollback(arguments: Sequence[str]) -> int:
    settings = parse(SteerSettings, "pool rollback", arguments)
    return _steer(settings, lambda _, now: _rule(PoolRule("pin", _canary(settings.pool, now).rest)))


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": list_, "newest": newest, "pin": pin, "canary": canary, "promote": promote, "rollback": rollback,
}  # fmt: skip


def _steer(settings: SteerSettings, rule: Callable[[Broker, PoolRule], Awaitable[PoolRule]]) -> int:
    """Replace the pool's rule by what `rule` makes of it."""
    check_name("pool", settings.pool)

    async def run(broker: Broker) -> int:
        while True:
            judged, now = await broker.pools.rule(settings.pool)
            wanted = await rule(broker, now)
            if wanted == now or await broker.pools.steer(settings.pool, wanted, judged):
                print(f"pool {settings.pool}: {describe(wanted)}")
                return 0

    return with_broker(settings, run)


async def _rule(rule: PoolRule) -> PoolRule:
    return rule


async def _check_published(broker: Broker, policy: str, version: int) -> None:
    if version == 0 or await broker.weights.get(policy, version) is not None:
        return
    newest = await broker.weights.newest(policy)
    there = f"its newest is {newest.version}" if newest else "it has none yet"
    raise ConfigurationError(f"version = {version}: policy {policy!r} has not published it; {there}")


def _canary(pool: str, now: PoolRule) -> PoolRule:
    if now.mode != "canary":
        raise ConfigurationError(f"pool {pool!r} has no canary to promote or roll back: {describe(now)}")
    return now


def describe(rule: PoolRule) -> str:
    """The rule in words."""
    if rule.mode == "pin":
        return f"pinned to version {rule.version} (lachesis pool newest: follow the newest again)"
    if rule.mode == "canary":
        return f"version {rule.version} on {rule.share:.0%} of the servers, version {rule.rest} on the rest"
    return "follows the newest version"


def _show(found: Sequence[tuple[str, PoolRule, Sequence[ServerStatus]]]) -> None:
    console, now = Console(highlight=False, markup=False), time.time()
    for pool, rule, servers in found:
        console.print(f"pool {pool}: {describe(rule)}")
        table = Table.grid(padding=(0, 2))
        for status in servers:
            state = status.state if now - status.heartbeat < STALE_S else "silent"
            version = f"version {status.version}" if status.version >= 0 else "no version"
            table.add_row("", status.server, state, status.rule, version, status.checksum[:12], status.last_error)
        console.print(table)

"""`lachesis pool list | newest | pin | canary | promote | rollback`: which version the servers of a pool serve."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError, did_you_mean
from lachesis.broker.records.keys import check_name
from lachesis.broker.records.versions import PoolRule, ServerStatus, WeightsEntry
from lachesis.broker.run.servers import is_live
from lachesis.broker.weights.pools import NEWEST, NONE
from lachesis.cli.actions import MAIN, check_policy, dispatch, with_broker
from lachesis.cli.options import parse
from lachesis.cli.terminal import console, say, say_json
from lachesis.service.settings import RedisSettings

USAGE = """\
usage: lachesis pool list [--json]
       lachesis pool newest
       lachesis pool pin VERSION
       lachesis pool canary VERSION [--share 0.25]
       lachesis pool promote
       lachesis pool rollback

Which published version the servers of a pool serve:
  newest      the newest one, as soon as it is published (what a pool does that was never told otherwise)
  pin         this version and no other, older ones too; 0 is the base model, which servers have from their --model
  canary      this version on a share of the servers; the others stay at the version that the pool has now
  promote     the canary's version everywhere: pins the pool to it
  rollback    the others' version everywhere: pins the pool to it
Every action takes --pool, --redis-url and --run; `lachesis pool pin --help` explains them. docs/inference.md says more."""


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

    version: CliPositionalArg[int] = Field(
        ge=0, description="the version; 0 is the base model, which servers have from their --model"
    )


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
        await _check_pool(broker, settings.pool)
        servers = sorted(await broker.registry.servers(), key=lambda status: status.server)
        pools = sorted({settings.pool, *(status.pool for status in servers)})
        found = [
            (pool, (await broker.pools.rule(pool))[1], [status for status in servers if status.pool == pool])
            for pool in pools
        ]
        if settings.json_output:
            rows = [{"pool": pool, "rule": rule, "servers": servers} for pool, rule, servers in found]
            say_json(rows)
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
        await _check_published(broker, settings.policy, rest)
        return PoolRule("canary", settings.version, rest, settings.share)

    return _steer(settings, rule)


def promote(arguments: Sequence[str]) -> int:
    return _end_canary("promote", arguments, lambda canary: canary.version)


def rollback(arguments: Sequence[str]) -> int:
    return _end_canary("rollback", arguments, lambda canary: canary.rest)


def _end_canary(action: str, arguments: Sequence[str], which: Callable[[PoolRule], int]) -> int:
    settings = parse(SteerSettings, f"pool {action}", arguments)

    async def rule(broker: Broker, now: PoolRule) -> PoolRule:
        version = which(_canary(settings.pool, now))
        await _check_published(broker, settings.policy, version)
        return PoolRule("pin", version)

    return _steer(settings, rule)


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": list_, "newest": newest, "pin": pin, "canary": canary, "promote": promote, "rollback": rollback,
}  # fmt: skip


def _steer(settings: SteerSettings, rule: Callable[[Broker, PoolRule], Awaitable[PoolRule]]) -> int:
    """Replace the pool's rule by what `rule` makes of it."""
    check_name("pool", settings.pool)

    async def run(broker: Broker) -> int:
        await check_policy(broker, settings.policy)
        await _check_pool(broker, settings.pool)
        while True:
            judged, now = await broker.pools.rule(settings.pool)
            wanted = await rule(broker, now)
            if wanted == now or await broker.pools.set_rule(settings.pool, wanted, judged):
                say(f"pool {settings.pool}: {describe(wanted)}")
                return 0

    return with_broker(settings, run)


async def _check_pool(broker: Broker, pool: str) -> None:
    """Raise ConfigurationError for a pool that no server is in, if there are others, and that never had a rule."""
    pools = sorted({status.pool for status in await broker.registry.servers()} | {MAIN})
    if pool not in pools and (await broker.pools.rule(pool))[0] == NONE:
        raise ConfigurationError(
            f"--pool = {pool!r}: no server is in such a pool; there {'are' if len(pools) > 1 else 'is'} {', '.join(pools)}"
            f"{did_you_mean(pool, pools)}"
        )


async def _rule(rule: PoolRule) -> PoolRule:
    return rule


async def _check_published(broker: Broker, policy: str, version: int) -> None:
    """Raise ConfigurationError, naming those there are, for a version that was never published or whose files are gone."""
    published = await broker.weights.published(policy)
    there = await asyncio.to_thread(_with_files, published)
    if version == 0 or version in there:
        return
    if version in {entry.version for entry in published}:
        why = "its files are gone"
    else:
        newest = f"its newest is {published[-1].version}" if published else "it has none yet"
        why = f"policy {policy!r} has not published it; {newest}"
    raise ConfigurationError(
        f"version = {version}: {why}; there are {_ranges(sorted({0, *there}))} (0 is the base model)"
    )


def _with_files(published: Sequence[WeightsEntry]) -> set[int]:
    """Versions whose files are in their folder or store; all, where none can be seen from here."""
    places: dict[str, set[str]] = {}
    seen = set()
    for entry in published:
        place, _, name = entry.uri.rstrip("/").rpartition("/")
        if place not in places:
            places[place] = _listed(place)
        if name in places[place]:
            seen.add(entry.version)
    return seen or {entry.version for entry in published}


def _listed(place: str) -> set[str]:
    """Names in a folder, or under a URL that fsspec reads; none where it can't be looked at."""
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(place)
        return {str(name).rstrip("/").rpartition("/")[2] for name in store.ls(path, detail=False)}
    except Exception as error:  # whatever keeps a store's client from looking; the servers look for themselves
        say(f"note: can't look into {place} from here: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return set()


def _ranges(versions: Sequence[int]) -> str:
    """`0, 108 to 115`."""
    runs: list[list[int]] = []
    for version in versions:
        if runs and version == runs[-1][1] + 1:
            runs[-1][1] = version
        else:
            runs.append([version, version])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


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
    width = None if sys.stdout.isatty() else 400  # an error is not cut
    screen, now = console(width=width), time.time()
    for pool, rule, servers in found:
        screen.print(f"pool {pool}: {describe(rule)}")
        table = Table.grid(padding=(0, 2))
        for status in servers:
            state = status.state if is_live(status, now) else "silent"
            version = f"version {status.version}" if status.version >= 0 else "no version"
            table.add_row("", status.server, state, status.rule, version, status.checksum[:12], status.last_error)
        screen.print(table)

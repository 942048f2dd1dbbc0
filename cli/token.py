"""`lachesis token create | list | revoke`: who may call the shim for a run."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records import Role, TokenRecord
from lachesis.broker.settings import RedisSettings
from lachesis.cli.options import parse

USAGE = """\
usage: lachesis token create --role environment|trainer|admin [--name NAME] [--run RUN]
       lachesis token list [--json] [--run RUN]
       lachesis token revoke NAME [--run RUN]

Bearer tokens for the shim, of one run. A run that never had a token is open to everyone who reaches the shim;
once it has one, every call needs one. `lachesis token create --help` lists the options, docs/security.md explains."""

T = TypeVar("T")


class CreateSettings(RedisSettings):
    """Make a token. It is printed once, on stdout: Redis keeps only its SHA-256."""

    role: Role = Field(description="what its holder may do: environment, trainer, or admin (everything)")
    name: str = Field("", description="what to call it, e.g. who gets it (default: the role and some digits)")


class ListSettings(RedisSettings):
    """Show the tokens of a run, revoked ones included."""

    json_output: bool = Field(False, alias="json", description="print one JSON array")


class RevokeSettings(RedisSettings):
    """Make a token useless; every shim knows within 5 seconds."""

    name: CliPositionalArg[str] = Field(description="name of the token")


def main(arguments: Sequence[str]) -> int:
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        print(USAGE)
        return 0
    if action not in ACTIONS:
        raise ConfigurationError(f"no such action: {action!r}; one of {', '.join(ACTIONS)}")
    ACTIONS[action](rest)
    return 0


def create(arguments: Sequence[str]) -> None:
    settings = parse(CreateSettings, "token create", arguments)
    token, record = _with_broker(settings, lambda broker: broker.tokens.create(settings.role, settings.name))
    print(
        f"token {record.name!r} for run {settings.run!r}, role {record.role}; it is not shown again:", file=sys.stderr
    )
    print(token)


def list_(arguments: Sequence[str]) -> None:
    settings = parse(ListSettings, "token list", arguments)
    records = _with_broker(settings, lambda broker: broker.tokens.all())
    if settings.json_output:
        print(msgspec.json.encode(records).decode())
    elif records:
        _show(records)
    else:
        print(f"run {settings.run!r} has no tokens: it is open, unless the shim runs with --require-tokens")


def revoke(arguments: Sequence[str]) -> None:
    settings = parse(RevokeSettings, "token revoke", arguments)
    record = _with_broker(settings, lambda broker: broker.tokens.revoke(settings.name))
    print(f"token {record.name!r} of run {settings.run!r} is revoked")


ACTIONS: dict[str, Callable[[Sequence[str]], None]] = {"create": create, "list": list_, "revoke": revoke}


def _with_broker(settings: RedisSettings, operation: Callable[[Broker], Awaitable[T]]) -> T:
    async def run(url: str) -> T:
        broker = await Broker.connect(url, settings.run)
        try:
            return await operation(broker)
        finally:
            await broker.aclose()

    with settings.redis() as url:
        return asyncio.run(run(url))


def _show(records: Sequence[TokenRecord]) -> None:
    table = Table.grid(padding=(0, 2))
    for record in records:
        state = "" if record.revoked_at is None else f"revoked {_when(record.revoked_at)}"
        table.add_row(record.name, record.role, f"made {_when(record.created_at)}", state)
    Console(highlight=False).print(table)


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))

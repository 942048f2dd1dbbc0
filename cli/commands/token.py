"""`lachesis token create | list | revoke`: who may call the shim for a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.records.keys import check_name
from lachesis.broker.records.registrations import Role, TokenRecord
from lachesis.cli.actions import dispatch, with_broker
from lachesis.cli.options import parse
from lachesis.cli.terminal import console, say, say_json
from lachesis.service.settings import RedisSettings

USAGE = """\
usage: lachesis token create --role environment|trainer|admin [--name NAME] [--run RUN]
       lachesis token list [--json] [--run RUN]
       lachesis token revoke NAME [--run RUN]

Bearer tokens for shim and front door, of one run. A run that never had a token is open to every program that reaches
them on this machine's loopback address, and with --open-runs on any address; else, and once it has one, every call
needs one.
`lachesis token create --help` lists the options, docs/security.md explains."""


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
    return dispatch(ACTIONS, USAGE, arguments)


def create(arguments: Sequence[str]) -> int:
    settings = parse(CreateSettings, "token create", arguments)
    if "name" in settings.model_fields_set:
        check_name("--name", settings.name)
    token, record = with_broker(
        settings, lambda broker: broker.tokens.create(settings.role, settings.name), existing=False
    )
    say(f"token {record.name!r} for run {settings.run!r}, role {record.role}; it is not shown again:", file=sys.stderr)
    say(token)
    return 0


def list_(arguments: Sequence[str]) -> int:
    settings = parse(ListSettings, "token list", arguments)
    records = with_broker(settings, lambda broker: broker.tokens.all())
    if settings.json_output:
        say_json(records)
    elif records:
        _show(records)
    else:
        say(
            f"run {settings.run!r} has no tokens: it is open where a shim listens on a loopback address or with --open-runs"
        )
    return 0


def revoke(arguments: Sequence[str]) -> int:
    settings = parse(RevokeSettings, "token revoke", arguments)

    async def run(broker: Broker) -> tuple[TokenRecord, bool]:
        record = await broker.tokens.revoke(settings.name)
        return record, any(token.revoked_at is None for token in await broker.tokens.all())

    record, more = with_broker(settings, run)
    rest = "" if more else "; it was the last one, and the run stays closed until another is made"
    say(f"token {record.name!r} of run {settings.run!r} is revoked{rest}")
    return 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"create": create, "list": list_, "revoke": revoke}


def _show(records: Sequence[TokenRecord]) -> None:
    table = Table.grid(padding=(0, 2))
    for record in records:
        state = "" if record.revoked_at is None else f"revoked {_when(record.revoked_at)}"
        table.add_row(record.name, record.role, f"made {_when(record.created_at)}", state)
    console().print(table)


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))

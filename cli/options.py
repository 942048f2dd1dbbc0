"""Command-line options into settings, with errors a person can act on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.settings import Settings

S = TypeVar("S", bound=Settings)


def parse(kind: type[S], command: str, arguments: Sequence[str]) -> S:
    """Settings of `kind` from flags, environment and TOML. `--help` prints and exits 0; a wrong value is one line."""
    source: CliSettingsSource[object] = CliSettingsSource(
        kind, cli_prog_name=f"lachesis {command}", cli_parse_args=False, cli_exit_on_error=False
    )
    try:
        return CliApp.run(kind, cli_args=list(arguments), cli_settings_source=source)
    except ValidationError as error:
        first = error.errors()[0]
        field = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
        raise ConfigurationError(f"{field} = {first['input']!r}: {first['msg']}") from None
    except SystemExit:
        raise
    except Exception as error:
        if type(error).__name__ != "SettingsError":
            raise
        print(f"usage: lachesis {command} --help", file=sys.stderr)
        raise ConfigurationError(str(error)) from None

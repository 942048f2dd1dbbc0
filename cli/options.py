"""Command-line options into settings, with errors a person can act on."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from lachesis.broker.errors import ConfigurationError, did_you_mean
from lachesis.cli.terminal import say
from lachesis.service.settings import NO_SETTINGS, PREFIX, Settings, found_toml, read_toml, toml_file

S = TypeVar("S", bound=Settings)
NEVER_FOUND = ("sglang_python", "sglang_args", "overrides")  # settings that name programs or code


def parse(kind: type[S], command: str, arguments: Sequence[str]) -> S:
    """Settings of `kind` from flags, environment and TOML. `--help` prints and exits 0; a wrong value is one line."""
    source: CliSettingsSource[object] = CliSettingsSource(
        kind, cli_prog_name=f"lachesis {command}", cli_parse_args=False, cli_exit_on_error=False
    )
    given = _given(source, kind, command, arguments)
    _check_names(kind)
    _announce_found(command)
    # a list's values are taken as they were written: pydantic-settings would split each at its commas
    lists: dict[str, Any] = {name: value for name, value in vars(given).items() if isinstance(value, list)}
    rest = Namespace(**{name: value for name, value in vars(given).items() if name not in lists})
    try:
        return CliApp.run(kind, cli_args=rest, cli_settings_source=source, **lists)
    except ValidationError as error:
        positional = {action.dest for action in source.root_parser._actions if not action.option_strings}  # type: ignore[attr-defined]
        raise ConfigurationError(_refusal(error, kind, vars(given), positional)) from None
    except SettingsError as error:  # a variable that is not the JSON its setting takes
        raise ConfigurationError(" ".join(f"{error}: {error.__cause__ or 'wrong value'}".split())) from None


def _given(
    source: CliSettingsSource[object], kind: type[Settings], command: str, arguments: Sequence[str]
) -> Namespace:
    """The command line's words by setting, wherever positional ones stand among the options."""
    try:
        given: Namespace = source.root_parser.parse_intermixed_args(list(arguments))  # type: ignore[attr-defined]
    except SettingsError as error:
        said = str(error).removeprefix("error parsing CLI: ")
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", said)
        meant = did_you_mean(unknown[1], _options(kind)) if unknown else ""
        raise ConfigurationError(f"{said}{meant or f'; `lachesis {command} --help` lists what it takes'}") from None
    return given


def _options(kind: type[Settings]) -> list[str]:
    return [_option(name, kind) for name in kind.model_fields]


def _option(name: str, kind: type[Settings]) -> str:
    return "--" + (kind.model_fields[name].alias or name).replace("_", "-")


def _refusal(error: ValidationError, kind: type[Settings], given: Collection[str], positional: Collection[str]) -> str:
    """Of the first wrong value: where it was given, the value, the rule."""
    first = error.errors()[0]
    if not first["loc"]:  # of several settings together
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    field = kind.model_fields.get(name)
    option = _option(name, kind) if field else f"--{name.replace('_', '-')}"
    option = name.upper() if name in positional else option
    if first["type"] == "missing":
        return f"{option} is missing: {field.description if field else 'required'}"
    place = option
    if name not in given and f"{PREFIX}{name}".upper() in {variable.upper() for variable in os.environ}:
        place = f"{PREFIX}{name.upper()}"
    elif name not in given:
        place = f"{name} in {toml_file()}"
    return f"{place} = {first['input']!r}: {first['msg']}"


# -- names that no command knows --------------------------------------------------------------------------------------


def _check_names(kind: type[Settings]) -> None:
    """Raise ConfigurationError for a variable or a key of the TOML file that is no setting of any command."""
    variables = {name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in NO_SETTINGS}
    named = {name: name.upper().removeprefix(PREFIX).lower() for name in sorted(variables)}
    keys = list(read_toml())
    mine = _names(kind)
    if mine.issuperset((*named.values(), *keys)):
        return
    known = all_names()  # one file serves all commands
    for variable, name in named.items():
        if name not in known:
            meant = did_you_mean(variable, [f"{PREFIX}{one.upper()}" for one in known])
            raise ConfigurationError(f"{variable}: no command has such a setting{meant}")
    for key in keys:
        if key not in known:
            raise ConfigurationError(f"{key} in {toml_file()}: no command has such a setting{did_you_mean(key, known)}")


def _announce_found(command: str) -> None:
    """Say that the current folder's file of settings is read. It may be another's: raise ConfigurationError where it says what to run."""
    if (path := found_toml()) is None:
        return
    for key in read_toml():
        if key in NEVER_FOUND:
            raise ConfigurationError(
                f"{key} in {path}: a file that nobody named may not say what is run; give {_option_of(key)}, "
                f"{PREFIX}{key.upper()}, or the file as {PREFIX}CONFIG"
            )
    say(f"lachesis {command}: settings from {path}", file=sys.stderr)


def _option_of(key: str) -> str:
    return "overrides on the command line" if key == "overrides" else f"--{key.replace('_', '-')}"


def all_names() -> set[str]:
    """The settings of all commands. Imports every command, but nothing heavy."""
    from lachesis.cli.catalogue import COMMANDS, SETTINGS

    for module in (*(command.module for command in COMMANDS.values()), *SETTINGS):
        import_module(module.partition(":")[0])
    return {name for kind in _descendants(Settings) for name in _names(kind)}


def _descendants(kind: type[Settings]) -> Iterator[type[Settings]]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)


def _names(kind: type[Any]) -> set[str]:
    return {field.alias or name for name, field in kind.model_fields.items()}

"""Settings every role shares, and where settings come from.

A setting has one name everywhere: `--redis-url` on the command line, `LACHESIS_REDIS_URL` in the environment and
`redis_url` in the TOML file that `LACHESIS_CONFIG` names (or ./lachesis.toml); in that order of precedence.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.keys import check_name
from lachesis.broker.store.embedded import EmbeddedRedis, Keeper

PREFIX = "LACHESIS_"
NO_SETTINGS = {  # variables of that prefix that are read elsewhere
    f"{PREFIX}{name}" for name in ("CONFIG", "LOG_FORMAT", "LOG_LEVEL", "CRASH_AT", "STOP_AT", "CPU_VISIBLE_DEVICES")
}

LONGEST_URL = 4096  # characters


class Settings(BaseSettings):
    """Base of all settings; subclasses add fields, each with a default and a description for `--help`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_prefix_target="all",  # of a setting with an alias, too
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="ignore",  # one TOML file serves all roles
        hide_input_in_errors=True,  # it may be a URL with a password
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        read_toml()  # which says in one line what is wrong with it
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file())


def toml_file() -> Path:
    """The file of settings, which need not exist unless `LACHESIS_CONFIG` names it."""
    return Path(os.environ.get(f"{PREFIX}CONFIG", "lachesis.toml"))


def found_toml() -> Path | None:
    """The file of the current folder that is read though nobody named it, if there is one."""
    path = toml_file()
    return path.absolute() if f"{PREFIX}CONFIG" not in os.environ and path.is_file() else None


def read_toml() -> dict[str, Any]:
    """What the file of settings holds. Raises ConfigurationError for one that can't be read."""
    path = toml_file()
    if not path.is_file():
        if f"{PREFIX}CONFIG" in os.environ:
            raise ConfigurationError(f"{PREFIX}CONFIG = {str(path)!r}: no such file")
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be read: {error.strerror}") from None


def read_url(path: str) -> str:
    """The one line that the file holds."""
    where = f"--redis-url-file = {path!r}"
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(LONGEST_URL + 1).split()
    except OSError as error:
        raise ConfigurationError(f"{where}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{where}: must hold a URL as text") from None
    if len(lines) != 1 or len(lines[0]) > LONGEST_URL:
        raise ConfigurationError(f"{where}: must hold one URL, and nothing else")
    return lines[0]


def make_folder(setting: str, folder: Path) -> Path:
    """The folder, made if need be. Raises ConfigurationError where it can't be made or written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{setting} = {str(folder)!r}: can't be made ({error.strerror}); give a folder that can be written to"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{setting} = {str(folder)!r}: not writable; give a folder that can be written to")
    return folder


class RedisSettings(Settings):
    """Which Redis, and which run on it."""

    redis_url: str = Field("", description="Redis to use, e.g. redis://localhost:6379/0 or unix:///path/to/socket")
    redis_url_file: str = Field("", description="file that holds that URL, where it has a password")
    embedded: bool = Field(False, description="use a Redis of our own, kept in the state folder")
    state_dir: Path = Field(
        Path(".lachesis"), description="folder for the embedded Redis, models, checkpoints and logs"
    )
    run: str = Field("default", description="name of the run: one training job's namespace on a Redis")

    def model_post_init(self, _: Any) -> None:
        if not self.redis_url_file:
            return
        if self.redis_url:
            raise ConfigurationError("--redis-url and --redis-url-file exclude each other: give one of them")
        self.redis_url, self.redis_url_file = read_url(self.redis_url_file), ""

    @contextmanager
    def redis(self, *, existing: bool = False) -> Iterator[str]:
        """The URL of the Redis to use; an embedded one lives as long as this context.

        With `existing` an embedded one is not made: who only looks at a run leaves nothing behind.
        """
        check_name("run", self.run)
        folder = self.state_dir / "redis"
        if self.embedded and self.redis_url:
            raise ConfigurationError("--embedded and --redis-url exclude each other: give one of them")
        if self.redis_url:
            yield self.redis_url
            return
        if not folder.is_dir():  # a state folder names its own Redis
            if existing and (self.embedded or "state_dir" in self.model_fields_set):
                raise ConfigurationError(
                    f"--state-dir = {str(self.state_dir)!r}: no run here, it holds no Redis; give the folder that the run "
                    "was started with, or --redis-url"
                )
            if not self.embedded:
                raise ConfigurationError(
                    "which Redis? Give --redis-url redis://HOST:PORT/0, or --embedded --state-dir DIR"
                )
        make_folder("--state-dir", self.state_dir)
        with EmbeddedRedis(make_folder("--state-dir", folder)) as server, Keeper(server):
            yield server.url

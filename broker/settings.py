"""Settings every role shares, and where settings come from.

A setting has one name everywhere: `--redis-url` on the command line, `LACHESIS_REDIS_URL` in the environment and
`redis_url` in the TOML file that `LACHESIS_CONFIG` names (or ./lachesis.toml); in that order of precedence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from lachesis.broker.embedded import EmbeddedRedis, Keeper
from lachesis.broker.errors import ConfigurationError


class Settings(BaseSettings):
    """Base of all settings; subclasses add fields, each with a default and a description for `--help`."""

    model_config = SettingsConfigDict(
        env_prefix="LACHESIS_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="ignore",  # one TOML file serves all roles
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
        toml = Path(os.environ.get("LACHESIS_CONFIG", "lachesis.toml"))
        if "LACHESIS_CONFIG" in os.environ and not toml.is_file():
            raise ConfigurationError(f"LACHESIS_CONFIG = {str(toml)!r}: no such file")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml)


class RedisSettings(Settings):
    """Which Redis, and which run on it."""

    redis_url: str = Field("", description="Redis to use, e.g. redis://localhost:6379/0 or unix:///path/to/socket")
    embedded: bool = Field(False, description="use a Redis of our own, kept in the state folder")
    state_dir: Path = Field(
        Path(".lachesis"), description="folder for the embedded Redis, models, checkpoints and logs"
    )
    run: str = Field("default", description="name of the run: one training job's namespace on a Redis")

    @contextmanager
    def redis(self) -> Iterator[str]:
        """The URL of the Redis to use; an embedded one lives as long as this context."""
        if self.embedded and self.redis_url:
            raise ConfigurationError("--embedded and --redis-url exclude each other: give one of them")
        if self.redis_url:
            yield self.redis_url
        elif self.embedded or (self.state_dir / "redis").is_dir():  # a state folder names its own Redis
            with EmbeddedRedis(self.state_dir / "redis") as server, Keeper(server):
                yield server.url
        else:
            raise ConfigurationError("which Redis? Give --redis-url redis://HOST:PORT/0, or --embedded --state-dir DIR")

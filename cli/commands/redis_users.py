"""`lachesis redis-users`: docs/security.md's users of Redis with passwords of their own, as files for the server and for each role."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from pydantic import Field

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.keys import check_name
from lachesis.cli.options import parse
from lachesis.cli.terminal import say
from lachesis.service.settings import Settings, make_folder

EVERY_RUN = "*"
ACL_FILE = "users.acl"
CLI = """#!/bin/sh
export REDISCLI_AUTH="$(cat "$(dirname "$0")/admin")"
exec "$(command -v valkey-cli || command -v redis-cli)" --user admin --no-auth-warning "$@"
"""


class RedisUsersSettings(Settings):
    """Write an `aclfile` with a user for each role, with random passwords, and for each role a file with the URL to connect with.

    DIR/redis/users.acl is for the server, DIR/redis/cli calls redis-cli as its administrator, and DIR/ROLE/redis-url is for
    --redis-url-file. What is there already is left as it is.
    """

    to: Path = Field(description="folder to write to")
    address: str = Field("redis://localhost:6379/0", description="URL of the server, without user and password")
    run: str = Field(EVERY_RUN, description="the one run that these users may see (*: every run of the server)")


def main(arguments: Sequence[str]) -> int:
    settings = parse(RedisUsersSettings, "redis-users", arguments)
    parts = urlsplit(settings.address)
    if not _is_address(parts) or "@" in settings.address:
        raise ConfigurationError(
            "--address: must be redis://HOST:PORT/0 or rediss://HOST:PORT/0, without user and password"
        )
    if settings.run != EVERY_RUN:
        check_name("run", settings.run)
    place = make_folder("--to", settings.to / "redis")
    if (place / ACL_FILE).exists():
        say(f"{place / ACL_FILE} is there already")
        return 0
    roles, passwords = read_rules(settings.run), dict[str, str]()
    for name in (*roles, "admin"):
        passwords[name] = secrets.token_urlsafe(32)
    for name in roles:
        url = parts._replace(netloc=f"{name}:{passwords[name]}@{parts.netloc}").geturl()
        _write(make_folder("--to", settings.to / name) / "redis-url", f"{url}\n")
    _write(place / "admin", passwords["admin"])
    _write(place / "cli", CLI, mode=0o700)
    rules = {**roles, "admin": "~* &* +@all"}
    lines = [f"user {name} on #{sha256(passwords[name].encode()).hexdigest()} {rules[name]}" for name in rules]
    # nobody can be the default user; but with its rights the server reads its own file, and leaves out what they forbid
    lines.append("user default off resetpass ~* &* +@all")
    _write(place / ACL_FILE, "\n".join((*lines, "")))  # last: it says that all are there
    say(f"users {', '.join(rules)}: {place / ACL_FILE}")
    return 0


def _is_address(parts: SplitResult) -> bool:
    try:
        numbers = parts.port != 0 and re.fullmatch(r"/?\d*", parts.path, re.ASCII)
    except ValueError:
        return False
    return parts.scheme in ("redis", "rediss") and bool(parts.hostname and numbers)


def read_rules(run: str) -> dict[str, str]:
    """What each role may do, in Redis's words."""
    text = (files("lachesis.broker") / ACL_FILE).read_text()
    named = (line.split(" reset on >PASSWORD ") for line in text.splitlines())
    return {name: rules.replace("{teamA}", f"{{{run}}}") for name, rules in named}


def _write(path: Path, text: str, mode: int = 0o600) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode)
    path.write_text(text)

"""What lies on disk is for who runs Lachesis; and who writes to the current folder neither runs a program nor is read unseen."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import LACHESIS, python
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from lachesis.broker import EmbeddedRedis
from lachesis.cli.commands.redis_users import read_rules

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_the_embedded_redis_keeps_its_files_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "redis"
    folder.mkdir(parents=True)
    assert mode(folder) == 0o755  # as an older version made it
    with EmbeddedRedis(folder) as server:
        Redis(unix_socket_path=str(server.socket)).set("rollout", "secret")
        assert mode(folder) == 0o700
        written = [path for path in folder.rglob("*") if path.is_file() or path.is_socket()]
        assert {"redis.log", "redis.lock"} < {path.name for path in written}
        assert mode(server.socket) == 0o600
        assert any(path.suffix == ".aof" for path in written)
        assert [path for path in written if mode(path) != 0o600] == []


@pytest.mark.usefixtures("usual_umask")
def test_a_command_makes_folders_and_files_for_its_user_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = python.run(*LACHESIS, "token", "create", "--role", "admin", "--embedded", "--state-dir", str(state))
    assert done.returncode == 0, done.stderr
    made = [state, *state.rglob("*")]
    assert len(made) > 3
    assert [path for path in made if mode(path) & 0o077] == []


def test_a_file_of_settings_that_was_merely_found_is_announced_and_runs_nothing(tmp_path: Path) -> None:
    toml = tmp_path / "lachesis.toml"
    toml.write_text('redis_url = "redis://127.0.0.1:1/0"\n')
    said = python.run(*LACHESIS, "status", cwd=tmp_path).stderr.splitlines()
    assert said[0] == f"lachesis status: settings from {toml}"
    assert "no Redis answers at redis://127.0.0.1:1/0" in said[1]
    for line in ("sglang_python = './python'", "sglang_args = '--model-impl x'", "overrides = ['a=b']"):
        toml.write_text(line)
        done = python.run(*LACHESIS, "up", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{line.partition(' ')[0]} in {toml}: a file that nobody named may not say what is run" in done.stderr
        named = python.run(*LACHESIS, "status", cwd=tmp_path, env={**os.environ, "LACHESIS_CONFIG": str(toml)})
        assert "which Redis?" in named.stderr
        assert "settings from" not in named.stderr


def test_the_users_made_for_redis_are_those_of_the_page(tmp_path: Path) -> None:
    lines = [line.removeprefix("ACL SETUSER ") for line in PAGE.read_text().splitlines() if "ACL SETUSER" in line]
    on_page = {line.split()[0]: line.partition(">PASSWORD ")[2] for line in lines if " reset on " in line}
    assert read_rules("teamA") == on_page

    made = python.run(*LACHESIS, "redis-users", "--to", str(tmp_path / "users"), "--run", "teamA")
    assert made.returncode == 0, made.stderr
    kept = (tmp_path / "users/redis/users.acl").read_text()
    assert "is there already" in python.run(*LACHESIS, "redis-users", "--to", str(tmp_path / "users")).stdout
    assert (tmp_path / "users/redis/users.acl").read_text() == kept
    urls = {path.parent.name: path.read_text().strip() for path in (tmp_path / "users").glob("*/redis-url")}
    assert urls.keys() == on_page.keys()
    assert len(set(urls.values())) == len(urls)
    assert [path for path in (tmp_path / "users").rglob("*") if mode(path) & 0o077] == []
    assert all(url.partition("@")[0].rpartition(":")[2] not in kept + made.stdout for url in urls.values())

    with EmbeddedRedis(tmp_path / "redis", config=[f'aclfile "{tmp_path}/users/redis/users.acl"']) as server:
        anybody = Redis(unix_socket_path=str(server.socket), retry=Retry(NoBackoff(), 0))
        for command in (
            ("PING",),
            ("GET", "x"),
            ("INFO",),
            ("ACL", "LIST"),
            ("FLUSHALL",),
            ("SUBSCRIBE", "x"),
            ("EVALSHA", "x", "0"),
        ):
            with pytest.raises(AuthenticationError):
                anybody.execute_command(*command)
        for name, url in urls.items():
            user, _, password = url.removeprefix("redis://").partition("@")[0].partition(":")
            assert user == name
            redis = Redis(unix_socket_path=str(server.socket), username=user, password=password)
            assert redis.info("server")
        admin = Redis(
            unix_socket_path=str(server.socket), username="admin", password=(tmp_path / "users/redis/admin").read_text()
        )
        assert admin.config_get("aclfile")

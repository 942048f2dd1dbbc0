"""`lachesis token`: what a person does with it, on a real Redis."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from commands import lachesis

from lachesis.broker import EmbeddedRedis


def test_a_token_is_told_once_listed_and_revoked(shared_redis: EmbeddedRedis) -> None:
    where = ("--redis-url", shared_redis.url, "--run", "tokens-of-the-command")
    assert "no such run" in lachesis("token", "list", *where).stderr  # which would be open, if it were one
    made = lachesis("token", "create", *where, "--role", "environment", "--name", "alice")
    assert made.returncode == 0
    token = made.stdout.strip()
    assert made.stdout.count("\n") == 1  # alone on stdout: TOKEN=$(lachesis token create …)
    assert "'alice' for run 'tokens-of-the-command', role environment; it is not shown again" in made.stderr
    assert lachesis("token", "create", *where, "--role", "admin").stdout.startswith("lachesis_")

    again = lachesis("token", "create", *where, "--role", "admin", "--name", "alice")
    assert (again.returncode, again.stdout) == (1, "")
    assert "has a token named 'alice' already" in again.stderr

    listed = json.loads(lachesis("token", "list", "--json", *where).stdout)
    assert [record["role"] for record in listed] == ["environment", "admin"]
    assert listed[0]["sha256"] == sha256(token.encode()).hexdigest()
    assert "'alice' of run 'tokens-of-the-command' is revoked\n" in lachesis("token", "revoke", "alice", *where).stdout
    shown = lachesis("token", "list", *where).stdout.splitlines()
    assert [line.split()[:2] for line in shown] == [["alice", "environment"], [listed[1]["name"], "admin"]]
    assert ["revoked" in line for line in shown] == [True, False]
    assert token not in "".join(shown)


def test_up_does_not_start_a_run_that_it_has_no_token_of(shared_redis: EmbeddedRedis, tmp_path: Path) -> None:
    where = ("--redis-url", shared_redis.url, "--run", "tokens-before-up")
    assert lachesis("token", "create", *where, "--role", "admin").returncode == 0
    ports = ("--shim-port", "0", "--front-door-port", "0")
    done = lachesis("up", *where, *ports, "--gpus", "0", "--fresh", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "run 'tokens-before-up' has tokens, and `lachesis up` has none for its environment" in done.stderr


def test_mistakes_are_one_clear_line(shared_redis: EmbeddedRedis, tmp_path: Path) -> None:
    where = ("--redis-url", shared_redis.url, "--run", "mistakes-of-the-command")
    assert lachesis("token", "create", *where, "--role", "admin").returncode == 0
    for arguments, says in (
        (("frobnicate",), "no such action: 'frobnicate'; one of create, list, revoke"),
        (("create", *where), "--role"),
        (("create", *where, "--role", "king"), "--role = 'king'"),
        (("create", *where, "--role", "admin", "--name", "a b"), "name = 'a b'"),
        (("revoke", "nobody", *where), "no token named 'nobody'"),
        (("list",), "which Redis?"),
    ):
        done = lachesis("token", *arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        lines = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
        assert len(lines) == 1
        assert says in lines[0]
    assert "usage: lachesis token create" in lachesis("token").stdout

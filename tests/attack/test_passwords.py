"""A password of Redis is nowhere to be seen: not in `ps`, not in logs, not in what a command says, however it was given."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import LACHESIS, python

from lachesis.broker import ConfigurationError, EmbeddedRedis
from lachesis.broker.store.connection import hide_password, open_redis
from lachesis.cli.options import parse
from lachesis.cli.up.plan import Processes, plan
from lachesis.cli.up.settings import UpSettings

SECRET = "S3cretPW"
PATIENCE_S = 60.0
MALFORMED = (
    f"redis//u:{SECRET}@h:1", f"redis:/u:{SECRET}@h", f"redis;//u:{SECRET}@h/0", f"u:{SECRET}@h", f"redis://:{SECRET}",
    f"redis://u:{SECRET}", f"redis://h:1/0?passwd={SECRET}", f"redis://h:1/0?password=a@{SECRET}", f"redis://u:a?{SECRET}@h:1",
    f"redis://u:a#{SECRET}@h", f"redis://u:a[{SECRET}@h:1/0", f"redis://u:a]{SECRET}@h:1/0", f"redis://u:\u2100{SECRET}@h:1",
    f"redis://h:1/0?{SECRET}", f"redis://h:1/0?Password={SECRET}", f"redis://h?password=x&{SECRET}", f"redis://{SECRET}@h:one",
    f"redis://u:{SECRET}/x@h:1/0", f"redis:///u:{SECRET}@h", f"redis://u:x?y={SECRET}@h", f"redis://u:%zz{SECRET}@h:x",
)  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that wants a password."""
    with EmbeddedRedis(tmp_path_factory.mktemp("guarded"), config=[f"user default on >{SECRET} ~* &* +@all"]) as server:
        yield f"unix://default:{SECRET}@{server.socket}"


def run(*arguments: str, **variables: str) -> str:
    """Everything that a command says."""
    done = python.run(*LACHESIS, *arguments, env={**os.environ, **variables})
    return done.stdout + done.stderr


@pytest.mark.parametrize("url", MALFORMED)
def test_what_is_hardly_a_url_does_not_show_its_password(url: str) -> None:
    assert SECRET not in hide_password(url)
    said = ""
    try:
        asyncio.run(open_redis(url).aclose())
    except ConfigurationError as error:
        said = str(error)
    assert SECRET not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "--redis_url", MALFORMED[0]), ("status", f"--redis-urll={MALFORMED[0]}"), ("status", MALFORMED[3]),
        (MALFORMED[0],), ("audit", "--json", MALFORMED[1]), ("status", f"--json={MALFORMED[0]}"), ("shim", "--port", MALFORMED[0]),
        ("status", "--redis-url-file", MALFORMED[0]), ("evaluate", "--front-door-url", f"x:{SECRET}@h"),
        ("status", "--state-dir", MALFORMED[0]), ("status", "--redis-url", f"redis://u:{SECRET}@127.0.0.1:1/0"),
    ],
)  # fmt: skip
def test_a_refused_argument_is_repeated_without_its_password(arguments: tuple[str, ...]) -> None:
    said = run(*arguments)
    assert said.startswith("lachesis")
    assert "Traceback" not in said
    assert SECRET not in said


def test_a_refused_variable_is_repeated_without_its_password() -> None:
    for name in ("LACHESIS_REDIS_URL", "LACHESIS_PORT", "LACHESIS_REDIS_URLL"):
        said = run("shim", **{name: MALFORMED[0]})
        assert "***@h:1" in said or name in said
        assert SECRET not in said


def test_a_file_may_hold_the_url(guarded: str, tmp_path: Path) -> None:
    file = tmp_path / "redis-url"
    file.write_text(f"{guarded}\n")
    told = {"LACHESIS_REDIS_URL_FILE": str(file)}
    assert "no such run" in run("status", "--redis-url-file", str(file))
    assert "no such run" in run("audit", **told)
    assert "exclude each other" in (said := run("status", "--redis-url", guarded, **told))
    assert SECRET not in said
    file.write_text(f"{guarded} {guarded}")
    assert "must hold one URL" in (said := run("status", **told))
    assert SECRET not in said
    assert "can't be read (Is a directory)" in run("status", "--redis-url-file", str(tmp_path))


def test_up_hides_it_from_the_arguments_and_logs_of_all_that_it_starts(guarded: str, tmp_path: Path) -> None:
    state, output = tmp_path / "state", tmp_path / "output"
    (tmp_path / "url").write_text(guarded)
    with open(output, "wb") as said:
        up = python.start(
            *LACHESIS, "up", "--run", "hidden", "--state-dir", str(state), "--shim-port", "0", "--front-door-port", "0",
            stdout=said, stderr=said, env={**os.environ, "LACHESIS_REDIS_URL_FILE": str(tmp_path / "url")},
        )  # fmt: skip
    try:
        logs, deadline, lines = state / "runs/hidden/logs", time.monotonic() + PATIENCE_S, list[str]()
        while (
            sum(re.search("inference --run|front-door --run|base-model --out", line) is not None for line in lines) < 3
        ):
            assert time.monotonic() < deadline, f"{lines}\n{output.read_text()}"
            time.sleep(0.05)
            lines = [" ".join(process.cmdline()) for process in psutil.Process(up.pid).children(recursive=True)]
        while "listening" not in (logs / "front-door.log").read_text():
            assert time.monotonic() < deadline, (logs / "front-door.log").read_text()
            time.sleep(0.05)
    finally:
        up.kill()
        up.wait()
    written = [*logs.iterdir(), output]
    assert SECRET not in "".join((*lines, *(file.read_text() for file in written)))


def test_no_part_that_up_starts_has_it_among_its_arguments(tmp_path: Path) -> None:
    settings = parse(UpSettings, "up", ["--state-dir", str(tmp_path), "--gpus", "0"])
    with socket.socket() as one:
        made = Processes(settings, plan(settings), f"redis://u:{SECRET}@h:1/0", tmp_path, one, one)
        parts = [made.shim(), made.front_door(), made.inference(0), made.trainer(), made.track()]
        others = [made.base_model(), made.env()]
    public = {name for name in dir(Processes) if not name.startswith("_")}
    assert public == {"shim", "front_door", "inference", "trainer", "track", "base_model", "env"}
    assert all(SECRET not in " ".join(part.argv) for part in (*parts, *others))
    assert all(part.env["LACHESIS_REDIS_URL"] == f"redis://u:{SECRET}@h:1/0" for part in parts)
    assert all(part.env["LACHESIS_REDIS_URL"] == "" for part in others)  # they need no Redis

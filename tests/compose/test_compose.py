"""`docker compose up` for real: built images, private network, the same loop, replicas, a kill."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = f"lachesis-test-{os.getpid()}"
STEPS = 12

pytestmark = [pytest.mark.compose, pytest.mark.timeout(2400)]


def compose(*arguments: str, check: bool = True) -> str:
    command = ["docker", "compose", "-p", PROJECT, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False, env={**os.environ, "STEPS": str(STEPS)}
    )
    assert done.returncode == 0 or not check, f"{command} ended with {done.returncode}: {done.stdout}"
    return done.stdout


def status() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(compose("exec", "-T", "shim", "lachesis", "status", "--json"))
    return found


def wait_for_step(step: int, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        now = status()
        if now["newest_step"] and now["newest_step"]["step"] >= step:
            return now
        time.sleep(2)
    raise AssertionError(
        f"step {step} was not reached in {timeout_s} s; status {now}\n{compose('logs', '--tail', '15')}"
    )


@pytest.fixture(scope="module")
def services() -> Iterator[None]:
    compose("build")
    try:
        compose("up", "--detach", "--scale", "shim=2", "--scale", "env=2", "--scale", "inference=2")
        yield
    finally:
        compose("down", "--volumes", "--timeout", "5", check=False)


def test_the_loop_runs_from_images_with_replicas_and_survives_a_kill(services: None) -> None:
    wait_for_step(3, timeout_s=420)
    compose("kill", "--signal", "SIGKILL", "trainer")
    compose("start", "trainer")  # a container killed by hand is not restarted by its policy
    now = wait_for_step(STEPS, timeout_s=420)

    ready = [server for server in now["servers"] if server["state"] in ("ready", "updating")]
    assert len(ready) == 2
    assert len(now["environments"]) >= 2
    audit = json.loads(compose("exec", "-T", "shim", "lachesis", "audit", "--json"))
    assert audit["clean"], audit
    newest = compose(
        "exec", "-T", "redis", "redis-cli", "XREVRANGE", "lachesis:{default}:ledger:main", "+", "-", "COUNT", "1"
    )
    assert newest.split()[0] == f"{STEPS}-0"


def test_redis_keeps_what_it_accepted_and_is_not_published(services: None) -> None:
    appendonly = compose("exec", "-T", "redis", "redis-cli", "CONFIG", "GET", "appendonly")

    assert appendonly.split()[1] == "yes"
    assert compose("exec", "-T", "redis", "redis-cli", "CONFIG", "GET", "maxmemory-policy").split()[1] == "noeviction"
    services_config = json.loads(compose("config", "--format", "json"))["services"]
    assert "ports" not in services_config["redis"]


def test_no_service_of_ours_runs_as_root(services: None) -> None:
    for service in ("shim", "front-door", "inference"):
        assert compose("exec", "-T", service, "id", "-u").strip() == "10001"

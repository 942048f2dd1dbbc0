"""`docker compose up` for real: built images, private network, the same loop, replicas, a shadow, kills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from project import Project

STEPS = 12

pytestmark = [pytest.mark.compose, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def services() -> Iterator[Project]:
    project = Project("test", {"STEPS": str(STEPS), "COMPOSE_PROFILES": "shadow", "ELASTIC": "false"})
    project.compose("build")
    try:
        project.compose("up", "--detach", "--scale", "shim=2", "--scale", "env=2", "--scale", "inference=2")
        yield project
    finally:
        project.down()


def test_the_loop_runs_from_images_with_replicas_and_survives_a_kill(services: Project) -> None:
    services.wait_for_step(3, timeout_s=420)
    services.wait("a shadow that may be 8 batches behind", lambda: rules(services) == [None, lossy(8)], 120)
    services.compose("kill", "--signal", "SIGKILL", "trainer", "shadow")
    services.compose("start", "trainer", "shadow")  # a container killed by hand is not restarted by its policy
    now = services.wait_for_step(STEPS, timeout_s=420)

    ready = [server for server in now["servers"] if server["state"] in ("ready", "updating")]
    assert len(ready) == 2
    assert len(now["environments"]) >= 2
    audit = services.lachesis("audit", "--json")
    assert audit["clean"], audit
    newest = services.redis("XREVRANGE", "lachesis:{default}:ledger:main", "+", "-", "COUNT", "1")
    assert newest.split()[0] == f"{STEPS}-0"

    services.wait_for_step(STEPS, timeout_s=120, policy="shadow")
    audit = services.lachesis("audit", "--policy", "shadow", "--json")
    assert audit["clean"], audit
    services.wait("a shadow that nobody waits for, as it is done", lambda: rules(services) == [None, lossy(1)], 60)
    main, shadow = policies(services)
    assert (main["policy"], main["rule"], main["committed"], shadow["policy"]) == ("main", None, STEPS, "shadow")
    assert 0 < shadow["committed"] == audit["steps"]
    assert shadow["committed"] + shadow["skipped"] <= STEPS  # it may have joined after the first ones


def policies(services: Project) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = services.lachesis("shadow", "--json")["policies"]
    return found


def rules(services: Project) -> list[dict[str, Any] | None]:
    return [policy["rule"] for policy in policies(services)]


def lossy(behind: int) -> dict[str, Any]:
    return {"kind": "lossy", "max_behind": behind}


def test_redis_keeps_what_it_accepted_and_is_not_published(services: Project) -> None:
    assert services.redis("CONFIG", "GET", "appendonly").split()[1] == "yes"
    assert services.redis("CONFIG", "GET", "maxmemory-policy").split()[1] == "noeviction"
    services_config = json.loads(services.compose("config", "--format", "json"))["services"]
    assert "ports" not in services_config["redis"]

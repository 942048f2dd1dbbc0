"""What each container of compose.yaml may do: tried from inside, and as the engine tells it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from project import Project

pytestmark = [pytest.mark.compose, pytest.mark.timeout(2400)]

OURS = ("redis-users", "base-model", "shim", "front-door", "inference", "trainer", "env")
NETWORKS = {
    **dict.fromkeys(("redis-users", "base-model"), frozenset({"none"})),
    **dict.fromkeys(("shim", "front-door"), frozenset({"fabric", "environments"})),
    **dict.fromkeys(("redis", "inference", "trainer"), frozenset({"fabric"})),
    "env": {"environments"},
}
MOUNTS = {  # volume → whether it may be written to
    "redis": {"redis": True, "redis-users": False},
    "base-model": {"models": True},
    "shim": {"shim-user": False},
    "front-door": {"front-door-user": False},
    "inference": {"inference-user": False, "models": False, "weights": False},
    "trainer": {"trainer-user": False, "models": False, "weights": True, "checkpoints": True},
    "env": {"models": False},
}
TRY = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
except OSError as error:
    sys.exit(f"refused: {error}")
print("connected")
"""


@pytest.fixture(scope="module")
def locked() -> Iterator[Project]:
    project = Project("locked", {"STEPS": "1000"})
    project.compose("build")
    try:
        project.compose("up", "--detach")
        yield project
    finally:
        project.down()


def reaches(project: Project, service: str, host: str, port: int) -> bool:
    said = project.compose("exec", "-T", service, "python", "-c", TRY, host, str(port), check=False)
    return said.strip() == "connected"


def test_an_environment_reaches_the_shim_and_the_front_door_and_nothing_else(locked: Project) -> None:
    assert reaches(locked, "shim", "redis", 6379)
    assert reaches(locked, "env", "shim", 8000)
    assert reaches(locked, "env", "front-door", 9000)
    redis = locked.inspect("redis")["NetworkSettings"]["Networks"]
    address = next(iter(redis.values()))["IPAddress"]
    for host, port in (("redis", 6379), (address, 6379), ("trainer", 6379), ("inference", 30000)):
        assert not reaches(locked, "env", host, port), (host, port)
    assert "/state/checkpoints" not in locked.compose("exec", "-T", "env", "cat", "/proc/mounts")
    for path in ("/users/redis-url", "/state/weights", "/state/checkpoints"):
        assert locked.compose("exec", "-T", "env", "sh", "-c", f"test -e {path} || echo none").strip() == "none"
    variables = locked.compose("exec", "-T", "env", "env")
    assert "REDIS" not in variables


def test_redis_answers_nobody_without_a_password(locked: Project) -> None:
    """And each service has that of its own role."""
    ask = "import redis, sys; print(redis.Redis(host='redis').execute_command(*sys.argv[1:]))"
    for command in (("GET", "x"), ("INFO",), ("CONFIG", "GET", "*")):
        said = locked.compose("exec", "-T", "shim", "python", "-c", ask, *command, check=False)
        assert said == "", said
    mine = (
        "import redis, urllib.parse; url = open('/users/redis-url').read().strip(); redis.Redis.from_url(url).ping(); "
        "print(urllib.parse.urlsplit(url).username)"
    )
    for service in ("shim", "front-door", "trainer", "inference"):
        assert locked.compose("exec", "-T", service, "python", "-c", mine, check=False).strip() == service
    users = locked.redis("ACL", "LIST")
    assert "nopass" not in users
    assert "user default off" in users


@pytest.mark.parametrize("service", [*OURS, "redis"])
def test_a_container_has_no_capability_and_a_root_that_it_can_not_write_to(locked: Project, service: str) -> None:
    found: dict[str, Any] = locked.inspect(service)
    host = found["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["ReadonlyRootfs"]
    assert host["PidsLimit"] > 0
    assert {name.removeprefix(f"{locked.name}_") for name in found["NetworkSettings"]["Networks"]} == NETWORKS[service]
    volumes = {
        mount["Name"].removeprefix(f"{locked.name}_"): mount["RW"]
        for mount in found["Mounts"]
        if mount["Type"] == "volume"
    }
    assert service not in MOUNTS or volumes == MOUNTS[service]
    assert not [mount for mount in found["Mounts"] if mount["Type"] == "bind"]


@pytest.mark.parametrize("service", ["shim", "front-door", "inference", "trainer", "env", "redis"])
def test_what_runs_there_is_nobody_and_writes_to_memory_only(locked: Project, service: str) -> None:
    said = locked.compose(
        "exec", "-T", service, "sh", "-c",
        "id -u; grep CapEff /proc/1/status; grep NoNewPrivs /proc/1/status; touch /opt/x /usr/x /x 2>/dev/null || echo refused",
    )  # fmt: skip
    assert said.split() == ["10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1", "refused"]

"""Trainers scaled like web servers: 1, 3, 2 of them in the middle of a run, and every kind of container killed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from project import Project

STEPS, STEPS_LONG = 30, 44
KILLED, KILLED_LONG = ("redis", "inference"), ("redis", "shim", "front-door", "inference", "env")
PATIENCE_S = 420.0

pytestmark = [pytest.mark.compose, pytest.mark.timeout(2400)]


@pytest.fixture
def steps(long_form: bool) -> int:
    return STEPS_LONG if long_form else STEPS


@pytest.fixture
def project(steps: int) -> Iterator[Project]:
    made = Project("scaling", {"STEPS": str(steps)})
    made.compose("build")
    try:
        made.compose("up", "--detach")
        yield made
    finally:
        made.down()


def replicas(project: Project) -> list[Any]:
    (main,) = project.lachesis("trainers", "--json")
    return list(main["replicas"])


def scale(project: Project, trainers: int) -> None:
    """That many trainers, two servers, two shims.

    However long they take to come, the run does not end meanwhile: the environment is stopped, and only what waits is trained.
    """
    project.compose("stop", "env")
    wanted = {"trainer": trainers, "inference": 2, "shim": 2}
    scales = [f"--scale={service}={count}" for service, count in wanted.items()]
    project.compose("up", "--detach", "--no-recreate", "--no-deps", *scales, *wanted)
    project.wait(f"{trainers} replicas", lambda: len(replicas(project)) == trainers, PATIENCE_S)
    project.compose("up", "--detach", "--no-recreate", "--no-deps", "env")


def step(project: Project) -> int:
    newest = project.lachesis("status", "--json")["newest_step"]
    return int(newest["step"]) if newest else 0


def test_trainers_come_and_go_in_mid_run_and_any_container_may_be_killed(
    project: Project, steps: int, long_form: bool
) -> None:
    project.wait_for_step(2, PATIENCE_S)
    assert len(replicas(project)) == 1
    scale(project, 3)
    project.wait_for_step(step(project) + 2, PATIENCE_S)
    assert len(replicas(project)) == 3

    containers = project.compose("ps", "--quiet", "trainer").split()
    assert len(containers) == 3
    project.compose("kill", "--signal", "SIGKILL", "trainer")  # all three at once
    scale(project, 3)
    project.wait_for_step(step(project) + 2, PATIENCE_S)
    scale(project, 2)
    for service in KILLED_LONG if long_form else KILLED:
        before = step(project)
        project.compose("kill", "--signal", "SIGKILL", service)
        project.compose("up", "--detach", "--no-recreate", "--scale=trainer=2", "--scale=inference=2", "--scale=shim=2")
        project.wait_for_step(min(before + 2, steps), PATIENCE_S)
    project.wait_for_step(steps, PATIENCE_S)

    audit = project.lachesis("audit", "--json")
    assert audit["clean"], audit
    ledger = project.redis("--raw", "XRANGE", "lachesis:{default}:ledger:main", "-", "+").splitlines()
    committed = [int(ledger[at + 1]) for at, word in enumerate(ledger) if word == "step"]
    assert committed == list(range(1, steps + 1))

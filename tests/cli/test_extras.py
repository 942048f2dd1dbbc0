"""The extras of the package: each part imports what its own extra brings, and says in a line which one is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lachesis.broker import EmbeddedRedis
from lachesis.cli.catalogue import COMMANDS, MODULES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {  # of each room; where two are named, what they have in common
    "broker": ("embedded",),
    "cli": ("shim",),  # `lachesis dead requeue` posts as the shim does
    "envs": ("envs",),
    "inference/agent": ("inference",),
    "inference/gateway": ("gateway",),
    "inference/versions": ("inference",),
    "service": ("shim", "gateway"),
    "shim": ("shim",),
    "trainer": ("trainer",),
}
NOWHERE = "redis://127.0.0.1:1/0"
STARTS = {  # each command that has an extra, as far as its imports
    "up": "--shim-port 0 --front-door-port 0",
    "shim": f"--redis-url {NOWHERE} --port 0",
    "front-door": f"--redis-url {NOWHERE} --port 0",
    "trainer": f"--redis-url {NOWHERE} actor_rollout_ref.model.path=.",
    "inference": f"--redis-url {NOWHERE} --model .",
    "env": "arithmetic --shim-url http://127.0.0.1:1 --front-door-url http://127.0.0.1:1 --model some/model",
    "evaluate": "--env gsm8k --front-door-url http://127.0.0.1:1",
    "base-model": "--out model",
}
WITHOUT = """\
import sys
from lachesis.cli.catalogue import MODULES
sys.modules.update(dict.fromkeys(MODULES["all"].split()))
from lachesis.cli.main import main
sys.exit(main())
"""


def without_extras(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command where no module of any extra can be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", STARTS)
def test_a_command_names_the_extra_that_it_lacks(command: str, tmp_path: Path) -> None:
    done = without_extras(tmp_path, command, *STARTS[command].split())
    assert done.returncode == 1
    assert done.stderr.endswith(
        f" is not installed: pip install 'lachesis-rl[{COMMANDS[command].extra}]' brings what this command needs\n"
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["status", "audit", "dead list", "token list", "pool list", "retention"])
def test_what_looks_at_a_run_needs_no_extra(command: str, shared_redis: EmbeddedRedis, tmp_path: Path) -> None:
    done = without_extras(tmp_path, *command.split(), "--redis-url", shared_redis.url, "--run", "nobodys-run")
    assert "no such run" in done.stderr


@pytest.mark.parametrize("room", EXTRAS)
def test_a_room_imports_what_its_extra_brings(room: str) -> None:
    brought = set.intersection(*(closure((*PROJECT["dependencies"], *listed(extra))) for extra in EXTRAS[room]))
    providers = packages_distributions()
    for module in third_party(ROOT / room):
        names = {canonicalize_name(name) for name in providers.get(module, [module])}
        assert names & brought, f"{room} imports {module}, which neither the base nor {EXTRAS[room]} brings"


def test_every_command_that_imports_more_than_the_base_is_tried() -> None:
    assert {name for name, command in COMMANDS.items() if command.extra} == {*STARTS, "dead"}
    assert {command.extra for command in COMMANDS.values()} - {""} == set(MODULES)
    assert set(MODULES) <= set(PROJECT["optional-dependencies"])


def listed(extra: str) -> list[str]:
    names: list[str] = PROJECT["optional-dependencies"][extra]
    return names


def closure(requirements: Iterable[str]) -> set[str]:
    """The distributions that they bring, as far as those are installed here."""
    found: set[str] = set()
    ahead = [Requirement(text) for text in requirements]
    while ahead:
        one = ahead.pop()
        if (name := canonicalize_name(one.name)) in found:
            continue
        found.add(name)
        try:
            needs = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        extras = one.extras or {""}
        ahead += [
            need for need in needs if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return found


def third_party(folder: Path) -> set[str]:
    """The modules, neither ours nor Python's, that any file of the folder imports at any place."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"lachesis"}

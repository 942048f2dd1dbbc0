"""The short form of `make chaos-elastic`, and that its verdict can be a bad one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soak
import spoilt
from trainer_kit import preload
from verdict import GROUPS, Found, contradictions, gid_of, undisturbed

KILLS, STEPS = 20, 3
pytestmark = [pytest.mark.anyio, pytest.mark.verl, pytest.mark.alone]


@pytest.fixture(scope="module", autouse=True)
def _forkserver() -> None:
    preload()


async def test_the_trajectory_is_one_whatever_is_killed(tmp_path: Path) -> None:
    report = await soak.run(tmp_path, kills=KILLS)
    print(soak.table(report))
    assert report["wrong"] == []
    assert report["steps"] >= 10


@pytest.mark.parametrize("replica", [spoilt.train_one_twice, spoilt.flip_a_bit])
async def test_a_group_trained_twice_and_a_flipped_bit_are_found(tmp_path: Path, replica: Callable[..., None]) -> None:
    report = await soak.run(tmp_path, kills=0, replica=replica)
    assert any("versions with other weights" in finding for finding in report["wrong"])


def found(**changed: Any) -> Found:
    hashes = undisturbed(STEPS)
    ledger = [(step, [gid_of((step - 1) * GROUPS + place) for place in range(GROUPS)]) for step in range(1, STEPS + 1)]
    versions = list(enumerate(hashes))
    clean = Found(STEPS, ledger, versions, {"r0": {"step": STEPS, "digest": hashes[-1]}}, STEPS, [])
    return replace(clean, **changed)


def test_what_a_run_without_faults_leaves_is_clean() -> None:
    assert contradictions(found()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ledger": [*found().ledger, (STEPS + 1, [gid_of(0)])]}, "in more than one committed step"),
        ({"ledger": found().ledger[1:]}, "in no committed step"),
        ({"versions": found().versions[1:]}, "versions are not 0 to"),
        ({"left": {"r0": {"step": STEPS, "digest": "another"}}}, "replicas with other weights"),
        ({"left": {}}, "no replica ended with"),
        ({"letters": STEPS + 1}, "were left out"),
    ],
)
def test_each_contradiction_is_found(changed: dict[str, Any], said: str) -> None:
    assert any(said in finding for finding in contradictions(found(**changed)))

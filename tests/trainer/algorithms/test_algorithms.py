"""Every algorithm and correction by name: a step equals the one that verl's own driver makes of the same groups.

Equal means: loss, gradient norm, every gradient and every metric that verl's driver reports, each to 1e-6 of the larger
of 1 and its own size (a gradient: of its tensor's largest element), in float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from same_step import MODES, Planned, assert_same_step, half

from lachesis.broker.records.groups import Group

pytestmark = pytest.mark.verl

PRESETS = Path(__file__).parents[3] / "trainer/config"
ALGORITHMS = sorted(path.stem for path in (PRESETS / "algo").glob("*.yaml"))
CORRECTIONS = sorted(path.stem for path in (PRESETS / "correction").glob("*.yaml"))
RATIOS = ("token_tis", "bypass_ppo_clip")  # are 1, and are not


@pytest.mark.parametrize(("algo", "correction", "mode"), half(ALGORITHMS, RATIOS, MODES))
def test_an_algorithms_step_is_verls(
    planned: Planned, groups: list[Group], algo: str, correction: str, mode: str
) -> None:
    mine = assert_same_step(planned, groups, f"algo={algo}", f"correction={correction}", **MODES[mode])
    assert (mine["clip_frac"] > 0) == (correction == "bypass_ppo_clip")


@pytest.mark.parametrize(("correction", "mode"), half(CORRECTIONS, MODES))
def test_a_corrections_step_is_verls(planned: Planned, groups: list[Group], correction: str, mode: str) -> None:
    mine = assert_same_step(planned, groups, f"correction={correction}", **MODES[mode])
    if "_rs" in correction:
        assert 0 < mine["rollout_corr/rollout_rs_seq_masked_fraction"] < 1

"""How old a step's tokens are, in weight versions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lachesis.broker.records.groups import Group
from lachesis.broker.records.steps import BatchEntry
from lachesis.trainer.data.validate import NOT_TRAINED

UNKNOWN = -1


def lag_of(batch: BatchEntry, version_before: int, *, shadow: bool) -> int:
    """Versions from a batch's oldest tokens to the weights that it trains.

    A shadow's tokens are of the other policy's versions. What that policy trains this batch from is the version of the step
    before, whichever step the shadow trained last.
    """
    return (batch.step - 1 if shadow else version_before) - batch.v_min


def lag_metrics(v_before: int, sequences: Iterable[tuple[Group, int]]) -> dict[str, float]:
    """Of the sequences (group, which of its) of a step that starts from version `v_before`.

    lag_mean is over trained tokens, version_known the share of them whose version is known; one whose version is not
    counts as its group's oldest. verl's names are of sequences: staleness of the newest version in one, _worst of the
    oldest, spans from one to the other; of a sequence that is not known whole these are its group's.
    """
    found = [(group, token_versions(group, index)) for group, index in sequences]
    if not found:
        return {"lag_mean": 0.0, "version_known": 0.0}
    bounds = [
        (versions.min(), versions.max()) if UNKNOWN not in versions and len(versions) else (group.v_min, group.v_max)
        for group, versions in found
    ]
    oldest, newest = np.array(bounds, dtype=np.int64).T
    tokens = np.concatenate([np.where(versions == UNKNOWN, group.v_min, versions) for group, versions in found])
    known = sum(int((versions != UNKNOWN).sum()) for _, versions in found)
    return {
        "lag_mean": float(v_before - tokens.mean()) if len(tokens) else 0.0,
        "version_known": known / len(tokens) if len(tokens) else 0.0,
        **spread("training/off_policy/trajectory_staleness", v_before - newest),
        **spread("training/off_policy/trajectory_staleness_worst", v_before - oldest),
        **spread("training/off_policy/trajectory_spans", newest - oldest + 1),
    }


def token_versions(group: Group, index: int) -> np.ndarray:
    """Which version made each trained token of a sequence, int64; UNKNOWN where nobody said."""
    trained = group.masks[index] != NOT_TRAINED
    versions = np.full(len(trained), UNKNOWN, dtype=np.int64)
    for version, start, end in group.versions[index] if group.versions else ():
        versions[start:end] = version
    found: np.ndarray = versions[trained]
    return found


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """name/mean, name/max and name/min; nothing of nothing."""
    if not len(values):
        return {}
    return {f"{name}/{what}": float(getattr(values, what)()) for what in ("mean", "max", "min")}

"""What replicas leave, against a run that nothing happens to: each group trained once, and the same weights, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from elastic_process import WORDS, TinyCompute

from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import to_arrays
from lachesis.broker.records.steps import BatchEntry

GROUPS = 6  # of a step, of two sequences each


@dataclass
class Found:
    """What is in Redis, and what replicas that ended said of their weights."""

    steps: int  # that there were groups for
    ledger: Sequence[tuple[int, Sequence[str]]]  # (step, gids)
    versions: Sequence[tuple[int, str]]  # (version, hash of its weights)
    left: dict[str, dict[str, Any]]  # replica → step and hash of its weights
    letters: int  # sequences that could not be trained; there is one in each step
    findings: Sequence[str]  # of the audit that every run can have


def gid_of(number: int) -> str:
    return f"g{number:06d}"


def group(number: int) -> ScoredGroup:
    """The run's groups, in the order in which they are queued; no two near each other are alike."""
    tokens = [[number // WORDS**2 % WORDS, number // WORDS % WORDS, number % WORDS, index] for index in range(2)]
    return ScoredGroup(tokens=tokens, masks=tokens, scores=[1.0, -0.5], env_id=0)


def undisturbed(steps: int) -> list[str]:
    """Hashes of the weights of all versions of a run without faults, trained here."""
    compute = TinyCompute()
    hashes = [compute.digest()]
    for step in range(1, steps + 1):
        numbers = range((step - 1) * GROUPS, step * GROUPS)
        batch = BatchEntry(step, tuple(map(gid_of, numbers)), 2 * GROUPS, 8 * GROUPS, 0, 0, 0.0)
        told = compute.accumulate(batch, [(place, stored(number)) for place, number in enumerate(numbers)])
        compute.apply(batch, compute.sums(torch.device("cpu")), told)
        hashes.append(compute.digest())
    return hashes


def stored(number: int) -> Group:
    found = to_arrays(group(number))
    found.gid = gid_of(number)
    return found


def contradictions(found: Found) -> list[str]:
    """Everything that is not as in a run without faults."""
    wrong, expected = list(found.findings), undisturbed(found.steps)
    steps = [step for step, _ in found.ledger]
    if steps != list(range(1, found.steps + 1)):
        wrong.append(f"committed steps are not 1 to {found.steps}, each once: {_some(steps)}")
    times = Counter(gid for _, gids in found.ledger for gid in gids)
    if twice := [gid for gid, count in times.items() if count > 1]:
        wrong.append(f"groups in more than one committed step: {_some(twice)}")
    if missing := [gid for gid in map(gid_of, range(found.steps * GROUPS)) if gid not in times]:
        wrong.append(f"groups in no committed step: {_some(missing)}")
    versions = [version for version, _ in found.versions]
    if versions != list(range(found.steps + 1)):
        wrong.append(f"versions are not 0 to {found.steps}, each once: {_some(versions)}")
    hashes = dict(enumerate(expected))
    if other := [version for version, digest in found.versions if digest != hashes.get(version)]:
        wrong.append(f"versions with other weights than without faults: {_some(other)}")
    left = {name: told for name, told in found.left.items() if told["step"] >= 0}  # others had got no weights yet
    if behind := [
        f"{name} at step {told['step']}" for name, told in left.items() if told["digest"] != hashes[told["step"]]
    ]:
        wrong.append(f"replicas with other weights than without faults: {_some(behind)}")
    if not any(told["step"] == found.steps for told in left.values()):
        wrong.append(f"no replica ended with the weights of step {found.steps}")
    if found.letters != found.steps:
        wrong.append(f"{found.letters} sequences were left out, one of each of {found.steps} steps should be")
    return wrong


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")

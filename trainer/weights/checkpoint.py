"""Checkpoints: everything that a later process needs to go on as if nothing had happened.

verl's own checkpoint manager writes parameters, optimizer, scheduler and random states; here they become a folder that
is complete or absent: `step-<n>.<writer>.tmp` is written and synced, its manifest's digest is noted in Redis, then it is
renamed to `step-<n>`, where that is not there: one who was stopped while it saved, and finds another's, throws its own
away. Only what Redis knows is loaded, and only if each file is what it was when it was saved.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from lachesis.broker import BlockingBroker
from lachesis.broker.errors import CheckpointRefused
from lachesis.broker.failpoints import failpoint
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.weights.checkpoint_files import CHECKPOINT_MANIFEST, check_files, read_manifest, write_manifest
from lachesis.trainer.weights.fsync import fsync_tree, rename_durably

KEEP_CHECKPOINTS = 2


class Checkpoints:
    """The checkpoints of one policy in one folder; the newest two are kept.

    `unverified`: load also those that Redis does not know.
    """

    def __init__(
        self, folder: Path, worker: Any, broker: BlockingBroker, policy: str, *, unverified: bool = False
    ) -> None:
        self.folder, self._worker, self._writer = folder, worker, uuid4().hex[:12]
        self._broker, self._digests, self._policy = broker, broker.broker.checkpoints, policy
        self._unverified = unverified
        self._refused: set[int] = set()  # their files are not what they were
        for unfinished in folder.glob("step-*.tmp"):
            shutil.rmtree(unfinished)

    def found(self) -> list[int]:
        """Steps of all folders that look like complete checkpoints, oldest first, whoever made them."""
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir() if not path.is_symlink())
        return sorted(
            int(name[1]) for name in names if name and (self._path(int(name[1])) / CHECKPOINT_MANIFEST).is_file()
        )

    def steps(self) -> list[int]:
        """Steps of complete checkpoints that trainers of this policy saved, oldest first."""
        known = self._broker.call(self._digests.known, self._policy)
        return [
            step
            for step in self.found()
            if known.get(_digest(read_manifest(self._path(step)))) == step and step not in self._refused
        ]

    def save(self, step: int) -> None:
        """Write the worker's state after `step`; the weights of a step that is there already are the same."""
        if step in self.steps():
            return
        temporary = self.folder / f"step-{step}.{self._writer}.tmp"
        temporary.mkdir(parents=True, mode=0o700)
        self._worker.save_checkpoint(str(temporary), None, step, None)
        digest = write_manifest(temporary, step)
        failpoint("checkpoint", step)
        fsync_tree(temporary)
        if step in self.steps():
            shutil.rmtree(temporary)
            return
        self._broker.call(self._digests.add, self._policy, digest, step)
        failpoint("checkpoint-noted", step)
        shutil.rmtree(self._path(step), ignore_errors=True)  # half deleted, see remove; or somebody else's
        rename_durably(temporary, self._path(step))
        self._refused.discard(step)
        self._collect()

    def load(self, step: int) -> None:
        """Raises CheckpointRefused unless each file is what a trainer of this policy saved."""
        folder, raw = self._path(step), read_manifest(self._path(step))
        if self._broker.call(self._digests.known, self._policy).get(_digest(raw)) == step:
            try:
                check_files(folder, raw)
            except CheckpointRefused:
                self._refused.add(step)
                raise
        elif not self._unverified:
            raise CheckpointRefused(
                f"{str(folder / CHECKPOINT_MANIFEST)!r} is not known to Redis: a trainer of policy {self._policy!r} notes what it "
                "saves. If you trust all who can write there (an older version noted nothing), load it once with "
                "lachesis.unverified_checkpoints=true"
            )
        self._worker.load_checkpoint(str(folder), None, False)

    def remove(self, step: int) -> None:
        """Delete a checkpoint; a crash in between leaves one that no longer counts as complete."""
        (self._path(step) / CHECKPOINT_MANIFEST).unlink()
        self._broker.call(self._digests.remove, self._policy, step=step)
        shutil.rmtree(self._path(step))

    def _collect(self) -> None:
        """Keep the newest ones, and nothing older, whoever made it."""
        for oldest in self.steps()[-KEEP_CHECKPOINTS:][:1]:
            for old in self.found():
                if old < oldest:
                    self.remove(old)
            self._broker.call(self._digests.remove, self._policy, before=oldest)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"


def make_checkpoints(plan: Plan, worker: Any, broker: BlockingBroker) -> Checkpoints:
    return Checkpoints(plan.checkpoint_dir, worker, broker, plan.policy, unverified=plan.unverified_checkpoints)


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()

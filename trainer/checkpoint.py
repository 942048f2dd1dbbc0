"""Checkpoints: everything that a later process needs to go on as if nothing had happened.

verl's own checkpoint manager writes parameters, optimizer, scheduler and random states; here they become a folder that
is complete or absent: `step-<n>.<writer>.tmp` is written and synced, then renamed to `step-<n>`, where that is not
there: one who was stopped while it saved, and finds another's, throws its own away.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from lachesis.broker.crash import crash_point
from lachesis.trainer.durable import rename_durably, sync_tree

KEEP = 2
STATE = "lachesis.json"


class Checkpoints:
    """The checkpoints of one policy in one folder; the newest two are kept."""

    def __init__(self, folder: Path, worker: Any) -> None:
        self.folder, self._worker, self._writer = folder, worker, uuid4().hex[:12]
        for unfinished in folder.glob("step-*.tmp"):
            shutil.rmtree(unfinished)

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name and (self._path(int(name[1])) / STATE).is_file())

    def save(self, step: int) -> None:
        """Write the worker's state after `step`; the weights of a step that is there already are the same."""
        if step in self.steps():
            return
        temporary = self.folder / f"step-{step}.{self._writer}.tmp"
        temporary.mkdir(parents=True)
        self._worker.save_checkpoint(str(temporary), None, step, None)
        (temporary / STATE).write_text(json.dumps({"step": step}) + "\n")
        crash_point("checkpoint", step)
        sync_tree(temporary)
        if step in self.steps():
            shutil.rmtree(temporary)
            return
        shutil.rmtree(self._path(step), ignore_errors=True)  # half deleted, see remove
        rename_durably(temporary, self._path(step))
        for old in self.steps()[:-KEEP]:
            self.remove(old)

    def load(self, step: int) -> None:
        self._worker.load_checkpoint(str(self._path(step)), None, False)

    def remove(self, step: int) -> None:
        """Delete a checkpoint; a crash in between leaves one that no longer counts as complete."""
        (self._path(step) / STATE).unlink()
        shutil.rmtree(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

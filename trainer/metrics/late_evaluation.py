"""Tells a run's trackers of an evaluation that came after its trainer's end: `python -m lachesis.trainer.metrics.late_evaluation RUN`.

The Redis is that of LACHESIS_REDIS_URL.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lachesis.broker import connect_blocking
from lachesis.trainer.config.compose import compose_config
from lachesis.trainer.engine.verl_engine import device_name
from lachesis.trainer.metrics.step import evaluation
from lachesis.trainer.metrics.tracker import open_tracker

POLICY = "main"


def main(url: str, run: str) -> int:
    """Pass on the newest evaluation, if no step was trained since; with the settings that the trainer was told."""
    with connect_blocking(url, run) as broker:
        _, newest = broker.call(broker.broker.journal.newest, 1, {"step", "eval"})
        kept = broker.call(broker.broker.registry.configurations).get(POLICY)
    if kept is None or not newest or "accuracy" not in newest[-1][1]:
        return 0
    if device_name() == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"  # before verl is imported: it looks once
    config = compose_config(kept.overrides, device=device_name())
    folder = Path(kept.state_dir) / "tracking" / run / POLICY
    fields = newest[-1][1]
    with open_tracker(config, run=run, policy=POLICY, folder=folder) as tracker:
        tracker.log(int(fields["version"]), evaluation(fields))
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ["LACHESIS_REDIS_URL"], *sys.argv[1:]))

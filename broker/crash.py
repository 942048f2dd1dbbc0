"""Dies at a named point of a named step (LACHESIS_CRASH_AT=point:step), so that tests can look at what a kill leaves."""

from __future__ import annotations

import os
import signal


def crash_point(point: str, step: int) -> None:
    if os.environ.get("LACHESIS_CRASH_AT") == f"{point}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)

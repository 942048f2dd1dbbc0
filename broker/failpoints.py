"""Dies, or stops until SIGCONT, at a named point of a named step, so that tests can look at what a kill or a silence leaves.

LACHESIS_CRASH_AT=point:step, LACHESIS_STOP_AT=point:step
"""

from __future__ import annotations

import os
import signal


def failpoint(point: str, step: int) -> None:
    if os.environ.get("LACHESIS_CRASH_AT") == f"{point}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("LACHESIS_STOP_AT") == f"{point}:{step}":
        del os.environ["LACHESIS_STOP_AT"]
        os.kill(os.getpid(), signal.SIGSTOP)

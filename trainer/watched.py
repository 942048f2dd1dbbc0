"""Calls that can't be interrupted, for those who must not wait for them for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Moving:
    """Since when nothing has moved."""

    def __init__(self) -> None:
        self.moved()

    def moved(self) -> None:
        self._at = time.monotonic()

    @property
    def stuck_s(self) -> float:
        return time.monotonic() - self._at


def watched(operation: Callable[[Moving], None], watch: Callable[[float], None]) -> None:
    """Run it in a thread, which is left to itself when `watch` raises. What it raises itself is lost: let it keep that."""
    moving = Moving()
    thread = threading.Thread(target=operation, args=(moving,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.01)
        watch(moving.stuck_s)

"""Calls that can't be interrupted, for those who must not wait for them for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable


def watched(operation: Callable[[], None], watch: Callable[[], None]) -> None:
    """Run it in a thread, which is left to itself when `watch` raises. What it raises itself is lost: let it keep that."""
    thread = threading.Thread(target=operation, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.01)
        watch()

"""Ports for servers that must be told one before they start."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, COUNT = 15_000, 15_000  # below those that the kernel gives to who asks for any
_tried = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """A port that nobody listens on. Another one each time, also in processes that run tests side by side."""
    while True:
        port = FIRST + next(_tried) % COUNT
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port

"""Listening sockets that outlive the processes serving them."""

from __future__ import annotations

import errno
import socket

from lachesis.broker.errors import ConfigurationError


def listen(host: str, port: int, option: str) -> socket.socket:
    """A listening TCP socket on host:port (0: any free port), to be handed to a child process.

    The supervisor keeps it open, so clients that connect while the child restarts wait in its backlog instead of
    being refused.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"{option} = {port}: another program listens on {host}:{port}; stop it, or give another port (0 takes a free one)"
            ) from None
        raise ConfigurationError(f"{option} = {port}: can't listen on {host}:{port}: {error.strerror}") from None
    listener.listen(1024)
    listener.set_inheritable(True)
    return listener

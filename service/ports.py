"""Ports to listen on, and what to tell a user whose choice can't be had."""

from __future__ import annotations

import errno
import socket

from lachesis.broker.errors import ConfigurationError


def bind(host: str, port: int, option: str = "") -> socket.socket:
    """A TCP socket bound to host:port (0: any free one).

    Raises ConfigurationError where that can't be; it names `option`, which the port was given by, or `--host` and `--port`.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigurationError(_why_not(error, host, port, option)) from None
    return bound


def listen(host: str, port: int, option: str) -> socket.socket:
    """A listening TCP socket on host:port (0: any free port), to be handed to a child process. Raises as `bind` does.

    The supervisor keeps it open, so clients that connect while the child restarts wait in its backlog instead of
    being refused.
    """
    listener = bind(host, port, option)
    listener.listen(1024)
    listener.set_inheritable(True)
    return listener


def find_free(host: str) -> int:
    """A port that nothing listens on at this moment."""
    with bind(host, 0) as probe:
        return int(probe.getsockname()[1])


def _why_not(error: OSError, host: str, port: int, option: str) -> str:
    if error.errno == errno.EADDRINUSE:
        other = "another port" if option else "another --port"
        return (
            f"{option or 'port'} = {port}: another program listens on {host}:{port}; "
            f"stop it, or give {other} (0 takes a free one)"
        )
    if option:
        return f"{option} = {port}: can't listen on {host}:{port}: {error.strerror}"
    return f"host = {host!r}, port = {port}: can't listen there: {error.strerror}"

"""Addresses of HTTP servers that somebody gave."""

from __future__ import annotations

from urllib.parse import urlsplit

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.store.connection import hide_password


def check_url(option: str, url: str) -> None:
    """Raise ConfigurationError unless it is the address of an HTTP server."""
    try:
        parts = urlsplit(url)
        possible = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        possible = False
    if not possible or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise ConfigurationError(f"{option} = {hide_password(url)!r}: must be http://HOST:PORT")

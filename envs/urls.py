"""Addresses that carry a token, as the password of any user."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit


def split_token(url: str) -> tuple[str, str]:
    """The address without the token, and the token; empty if there is none."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host).geturl(), unquote(parts.password or "")

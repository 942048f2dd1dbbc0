"""Settings of what a server bears of its clients."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from lachesis.broker.errors import ConfigurationError
from lachesis.service.settings import RedisSettings


class ConnectionSettings(RedisSettings):
    """Base of the settings of whatever serves HTTP."""

    max_body_bytes: int = Field(
        64 << 20, gt=0, description="largest request body, in bytes after decompression; larger ones get 413"
    )
    max_connections: int = Field(
        4096,
        ge=1,
        description="connections kept open at the same time; for one more, that without a request which waits longest is closed",
    )
    keep_alive_s: float = Field(20.0, gt=0, description="seconds after which a connection without a request is closed")
    forwarded_allow_ips: str = Field(
        "",
        description="addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, with "
        "commas between them (* for all; by default none are)",
    )


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,@*?#]+")

_HOST = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def _words(value: Any) -> Any:
    """Given once or several times, each with commas or without."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        return value  # which is refused
    return [word.strip().lower() for text in given for word in text.split(",") if word.strip()]


def _are_origins(words: list[str]) -> list[str]:
    for word in words:
        if not _ORIGIN.fullmatch(word):
            raise ValueError(f"{word!r} is not SCHEME://HOST[:PORT] as in a header Origin: no path, no *, not null")
    return words


def _are_hosts(words: list[str]) -> list[str]:
    for word in words:
        if not _HOST.fullmatch(word):
            raise ValueError(f"{word!r} is not a host's name without its port, *.DOMAIN, or * for any")
    return words


class CallerSettings(ConnectionSettings):
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every network")
    require_tokens: bool = Field(
        False,
        description="ask for a token also where a run has none, so that no run is open; "
        "the default where others than this machine reach the address",
    )
    open_runs: bool = Field(
        False, description="leave a run that never had a token open to all who reach the address, whoever they are"
    )
    allowed_host: Annotated[list[str], NoDecode, BeforeValidator(_words), AfterValidator(_are_hosts)] = Field(
        [],
        description="names, beside its address, localhost and this machine's own, under which clients call this server, "
        "comma-separated or repeated; *.DOMAIN for all below one, * for any",
    )
    allow_origin: Annotated[list[str], NoDecode, BeforeValidator(_words), AfterValidator(_are_origins)] = Field(
        [],
        description="origins whose web pages may call this server, as http://dashboard:3000, comma-separated or repeated; "
        "those of all others are refused",
    )

    def on(self, listeners: Iterable[socket.socket]) -> Self:
        """These settings as served on those sockets: where not only this machine reaches them, runs are closed by default."""
        if self.require_tokens and self.open_runs:
            raise ConfigurationError("--require-tokens and --open-runs exclude each other: give one of them")
        closed = self.require_tokens or not (self.open_runs or all(map(is_loopback, listeners)))
        return self.model_copy(update={"require_tokens": closed})


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    if listener.family == socket.AF_UNIX:
        return True
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    address = ipaddress.ip_address(listener.getsockname()[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback

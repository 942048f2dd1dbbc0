"""Settings of what a server bears of its clients."""

from __future__ import annotations

from pydantic import Field

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

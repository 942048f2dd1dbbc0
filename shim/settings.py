"""Settings of `lachesis shim`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lachesis.broker.settings import RedisSettings


class ShimSettings(RedisSettings):
    """The Atropos Trajectory API over Redis. Stateless: run as many as you like behind one address."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every network")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: any free one)")
    fd: int | None = Field(
        None,
        ge=0,
        description="an inherited listening socket to use instead of host and port, "
        "so that a supervisor keeps it open while this process restarts",
    )
    policy: str = Field("main", description="the policy whose batches GET /batch hands out")
    lease_s: float = Field(
        600, gt=0, description="seconds after which a batch that an HTTP trainer has not finished may go to another one"
    )
    max_body_bytes: int = Field(
        256 << 20, gt=0, description="largest request body, in bytes after decompression; larger ones get 413"
    )
    queue_quota_bytes: int = Field(
        0, ge=0, description="stored bytes of queued groups above which posts wait for up to 240 s (0: no limit)"
    )
    require_tokens: bool = Field(False, description="ask for a token also where a run has none, so that no run is open")
    tls_cert: Path | None = Field(None, description="certificate chain (PEM) to serve HTTPS with; needs --tls-key")
    tls_key: Path | None = Field(None, description="private key (PEM) of --tls-cert")

"""Settings of `lachesis shim`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lachesis.broker.records.groups import DUPLICATE_WINDOW_S, LONGEST_WINDOW_S, Limits
from lachesis.broker.records.steps import MAX_DELIVERIES
from lachesis.service.http.settings import CallerSettings


class ShimSettings(CallerSettings):
    """The Atropos Trajectory API over Redis. Stateless: run as many as you like behind one address."""

    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: any free one)")
    fd: int | None = Field(
        None,
        ge=0,
        description="an inherited listening socket to use instead of host and port, "
        "so that a supervisor keeps it open while this process restarts",
    )
    reuse_port: bool = Field(
        False,
        description="share host and port with other shims on this machine that say so too: "
        "each gets a part of the connections, and one may be replaced while the others serve",
    )
    policy: str = Field("main", description="the policy whose batches GET /batch hands out")
    lease_s: float = Field(
        600, gt=0, description="seconds after which a batch that an HTTP trainer has not finished may go to another one"
    )
    max_runs: int = Field(
        1000, ge=0, description="runs on this Redis at which one that is not known yet is refused (0: any number)"
    )
    max_body_lists: int = Field(
        250_000,
        gt=0,
        description="lists and objects that a large body may hold; more get 413. Not counted are a body of JSON of up to 1 MiB, "
        "decompressed, with up to 20,000 of them, and a packed one of up to 1 MiB with up to 64 KiB of nested values",
    )
    queue_quota_bytes: int = Field(
        0, ge=0, description="stored bytes of queued groups above which posts wait for up to 240 s (0: no limit)"
    )
    queue_quota_sequences: int = Field(0, ge=0, description="the same in sequences")
    env_quota_bytes: int = Field(
        0, ge=0, description="stored bytes of one environment's queued groups above which its posts wait (0: no limit)"
    )
    env_quota_sequences: int = Field(0, ge=0, description="the same in sequences")
    max_lag: int = Field(
        0,
        ge=0,
        description="steps that a group may be late for: posts wait while max_lag batches are queued, and groups more "
        "than max_lag versions old are not trained (0: no limit)",
    )
    duplicate_window_s: int = Field(
        DUPLICATE_WINDOW_S,
        ge=0,
        le=LONGEST_WINDOW_S,
        description="seconds for which a repeated post is taken for a retry and not stored again (0: only while its group is not trained)",
    )
    refused_bytes: int = Field(
        64 << 20,
        ge=0,
        description="bytes that a run keeps of the bodies of refused posts (lachesis dead), compressed, the newest; 0: only why",
    )
    max_deliveries: int = Field(
        MAX_DELIVERIES,
        ge=0,
        description="times that a batch is lent to trainers; one that none of them commits then is given up (0: never)",
    )

    tls_cert: Path | None = Field(None, description="certificate chain (PEM) to serve HTTPS with; needs --tls-key")
    tls_key: Path | None = Field(None, description="private key (PEM) of --tls-cert")

    @property
    def limits(self) -> Limits:
        """What may wait in the queue."""
        return Limits(
            bytes=self.queue_quota_bytes,
            sequences=self.queue_quota_sequences,
            env_bytes=self.env_quota_bytes,
            env_sequences=self.env_quota_sequences,
            max_lag=self.max_lag,
            policy=self.policy,
        )

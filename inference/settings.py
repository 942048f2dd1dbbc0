"""Settings of the room's two roles."""

from __future__ import annotations

import shlex
from typing import Literal

from pydantic import Field, field_validator

from lachesis.broker.run.lineage import MAX_BYTES
from lachesis.service.http.settings import CallerSettings
from lachesis.service.settings import RedisSettings


class AgentSettings(RedisSettings):
    """Run one SGLang server and keep its weights at the newest published version."""

    pool: str = Field("main", description="pool the server joins: the front door of that name sends it requests")
    policy: str = Field("main", description="policy whose published versions the server follows")
    server: str = Field("", description="name of the server in the pool; by default HOSTNAME:PORT")
    host: str = Field("127.0.0.1", description="address SGLang listens on")
    port: int = Field(0, ge=0, le=65535, description="port SGLang listens on (0: any free one)")
    advertise_url: str = Field(
        "",
        description="URL under which front doors reach SGLang; by default its host (or this machine's name) and port",
    )
    model: str = Field(
        "",
        description="served as version 0 until a version is published: a folder, which may still be in the making, "
        "or ORGANISATION/NAME on the Hugging Face hub; empty: wait for a published version",
    )
    sglang_python: str = Field(
        "", description="Python that has SGLang; by default this one, else .venv-sglang beside its environment"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where SGLang runs; auto: CUDA if there is any")
    context_length: int = Field(0, ge=0, description="tokens of prompt and output together (0: the model's own limit)")
    max_running_requests: int = Field(
        0, ge=0, description="sequences generated at the same time (0: SGLang's choice on CUDA, 128 on a CPU)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type SGLang computes in; auto: on a CPU the model's own, on CUDA SGLang's choice"
    )
    sglang_args: str = Field("", description="further options for SGLang, as one string of shell words")
    ready_timeout_s: float = Field(600.0, gt=0, description="seconds SGLang may take to start")
    keep_staged: int = Field(
        3,
        ge=1,
        description="versions kept in the state folder, of those that were published to a URL and had to be copied",
    )
    update_mode: Literal["retract", "drain", "in_place"] = Field(
        "retract",
        description="what becomes of running requests when a version is loaded; retract: they go on with the new weights, "
        "their cache made anew; drain: they end first; in_place: they go on with the new weights and their old cache",
    )
    update_at_once: int = Field(
        0, ge=0, description="servers of the pool that may load a version at the same time (0: half of them)"
    )

    @field_validator("sglang_args")
    @classmethod
    def _are_shell_words(cls, value: str) -> str:
        shlex.split(value)  # raises ValueError where a quotation has no end
        return value


class FrontDoorSettings(CallerSettings):
    """Serve one pool of SGLang servers at one address."""

    port: int = Field(9000, ge=0, le=65535, description="port to listen on (0: any free one)")
    fd: int | None = Field(
        None, ge=0, description="listening socket inherited from a supervisor, in place of host and port"
    )
    pool: str = Field("main", description="pool whose servers answer; also the model's name in /v1/models")
    policy: str = Field("main", description="policy whose published versions the pool follows")
    catch_up_s: float = Field(
        1.0, ge=0, description="seconds for which new requests wait for a server to load a newly published version"
    )
    max_lag: int = Field(
        0,
        ge=0,
        description="requests wait for a server that serves one of so many versions before the newest (0: any version)",
    )
    lineage_bytes: int = Field(
        MAX_BYTES,
        ge=0,
        description="bytes of the run's Redis for what is known of finished generations; the oldest go first (0: record none)",
    )
    atropos_ports: bool = Field(
        False,
        description="listen on ports 9004 to 9007 too, where some Atropos environments look whatever they are told",
    )
    upstream: str = Field(
        "", description="URL of a router, as sglang-router, that gets the requests in the place of the pool's servers"
    )
    patience_s: float = Field(
        300.0, gt=0, description="seconds a request waits for a server that can answer it, before it gets a 503"
    )
    pass_fields: str = Field(
        "",
        description="further fields of requests, and kinds of message parts, that are passed on to SGLang unchecked, "
        "as names with commas between them: image_url,image_data lets pictures through",
    )

"""What the routes answer: records, from which `/openapi.json` is generated too. Tests hold the real answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.responses import JSONResponse, Response

from lachesis.broker.records.groups import ScoredGroup

KEYS = tuple(name for name in ScoredGroup.__struct_fields__ if name != "weight_versions")  # upstream's
NO_EXAMPLE = (
    "tokens",
    "masks",
    "scores",
    "advantages",
    "ref_logprobs",
    "generation_params",
    "inference_logprobs",
    "messages",
    "images",
)


def answer(found: Struct, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The record as JSON, less what is UNSET."""
    return JSONResponse(msgspec.to_builtins(found), status, headers=headers)


class Greeting(Struct):
    message: str


class Registered(Struct):
    uuid: int  # of 128 bits: a client whose integers are floats can't keep it exactly


class EnvWaits(Struct):
    status: Literal["wait for trainer to start"]


class EnvRegistered(Struct):
    status: Literal["success"]
    env_id: int
    wandb_name: str
    checkpoint_dir: str
    starting_step: int
    checkpoint_interval: int
    num_steps: int


class Disconnected(Struct):
    status: Literal["success"]


class NotDisconnected(Struct):
    status: Literal["failure"]
    error: str


class WandbInfo(Struct):
    group: str | None
    project: str | None


class Info(Struct):
    batch_size: int  # sequences; -1 before a trainer has registered, as is max_token_len
    max_token_len: int


class RunStatus(Struct):
    current_step: int
    queue_size: int  # groups that no trainer has yet


class EnvStatus(Struct):
    current_step: int
    queue_size: int  # this and self_queue_size in groups of the asking environment's size
    unallocated_fraction: float
    self_queue_size: int
    max_group_size: int
    env_weight: float


class ValidationError(Struct):
    type: str
    loc: list[str | int]
    msg: str  # names field, value and rule
    input: Any
    ctx: dict[str, Any] | UnsetType = UNSET


class HTTPValidationError(Struct):
    detail: list[ValidationError]


class Refusal(Struct):
    detail: str


class Received(Struct):
    status: Literal["received"]


class Duplicate(Struct):
    status: Literal["duplicate"]
    detail: str  # by what it is known


class Buffered(Struct):
    status: Literal["buffered"]
    buffer_size: int  # sequences that wait with this group, whose size is not its environment's


class ListReceived(Struct):
    status: Literal["received", "duplicate"]  # duplicate: all of them
    groups_processed: int
    buffered: int | UnsetType = UNSET  # groups of other sizes than their environment's
    last_buffer_size: int | UnsetType = UNSET
    refused: int | UnsetType = UNSET  # well-formed groups that can't be trained, and why
    detail: list[ValidationError] | UnsetType = UNSET
    duplicates: int | UnsetType = UNSET  # repeated groups, which are not stored again


StoredGroup = msgspec.defstruct(
    "StoredGroup", [(field.name, field.type) for field in msgspec.structs.fields(ScoredGroup) if field.name in KEYS]
)  # a ScoredGroup on its way out: all keys are there
NoExample = msgspec.defstruct("NoExample", [(name, Annotated[list[Any], Meta(max_length=0)]) for name in NO_EXAMPLE])


class Batch(Struct):
    batch: list[StoredGroup] | None  # type: ignore[valid-type]


class NoTrainer(Struct):
    status: Literal["error"]
    message: str
    batch: Annotated[list[Any], Meta(max_length=0)]


class Run(Struct):
    run: str
    since: float  # seconds since the epoch


class RunList(Struct):
    runs: list[Run]


class Health(Struct, kw_only=True):
    run: str | UnsetType = UNSET  # all but the status only for who may read the run
    groups: dict[str, int] | UnsetType = UNSET  # counts of this process, as are those of lineage
    lineage: dict[str, int] | UnsetType = UNSET
    status: Literal["ok", "no redis", "redis demoted", "redis unready", "redis full", "redis forbids"]
    dead: int | UnsetType = UNSET  # of the run, as is dropped: not known without Redis
    dropped: dict[str, int] | UnsetType = UNSET
    duplicates: dict[str, int] | UnsetType = UNSET  # likewise; posts dropped as repeats, by environment
    reason: str | UnsetType = UNSET  # why no group can be stored

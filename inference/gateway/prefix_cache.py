"""Which prompts may share cached prefixes on a server whose cache outlives its weights (update mode `in_place`).

SGLang finds a cached prefix by its tokens and by `extra_key`. Such a server's status names its weights by a `prefix_key`
that no later load gets again, not even one of the same version; front doors send it along. So what was read by other
weights is not found: neither prefixes from before an update nor the mixture that a request leaves behind which went
through it. A front door may learn of an update late, though. A request that it sent under the old key then meets the
new weights, may find a prefix of the old ones, and its first token tells: its answer is asked for again. The token tells
a version, not a load, so the server's agent empties the cache whenever it goes back to an older version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from lachesis.broker.records.versions import ServerStatus
from lachesis.inference.gateway.protocols.sglang import Generated

ALONE = "alone"  # in the place of a key: which weights answer can't be known, so nothing may be shared


def choose_key(status: ServerStatus, path: str, body: Mapping[str, Any], *, sure: bool) -> str:
    """The key for a request; empty where the server needs none.

    It is one of its own unless the caller is `sure` of the status and `is_stale` will be able to judge the answer.
    """
    if not status.prefix_key:
        return ""
    return status.prefix_key if sure and not body.get("stream") and judges(status, path, body) else uuid4().hex


def judges(status: ServerStatus, path: str, body: Mapping[str, Any]) -> bool:
    """Whether `is_stale` can judge a complete answer of that server."""
    return status.prefix_key not in ("", ALONE) and _tells_versions(path, body)


def with_key(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The request under that key, and under the client's own besides."""
    clients = body.get("extra_key")
    if isinstance(clients, list):
        return {**body, "extra_key": [f"{key} {each}" for each in clients]}
    return {**body, "extra_key": f"{key} {clients}" if clients else key}


def is_stale(answer: Sequence[Generated], version: int | None) -> bool:
    """Whether an output may go on from a prefix that other weights read than those of its first token.

    That is, if its prefix was cached, or SGLang does not say that it was not, and the first token is of another version
    than the server had when it was asked (None: not known). Under a key of its own a prefix is cached, too, where a
    request wants several outputs: SGLang reads the prompt once, and then makes them.
    """
    for each in answer:
        meta = each.meta_info
        first = meta.weight_versions[0].version if meta.weight_versions else meta.weight_version
        if first != str(version) and meta.cached_tokens != 0:
            return True
    return False


def _tells_versions(path: str, body: Mapping[str, Any]) -> bool:
    """Whether the answer says of each of its outputs which version made it."""
    if path == "/generate":
        return True
    if path == "/v1/chat/completions" and body.get("return_meta_info"):
        return True
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    return body.get("n") in (None, 1) and not several

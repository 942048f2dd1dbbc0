"""A worker of large_bodies.py: reads bodies from its input, one after the other, until that ends."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lachesis.broker.errors import InvalidGroup
from lachesis.broker.queue.admission import admit
from lachesis.broker.records.body_limits import TooMany, check_json, check_msgpack
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import to_arrays, unpack, unpacked_bytes
from lachesis.shim.errors import Malformed
from lachesis.shim.intake.admission import MAX_SEQUENCES, env_of, pack_group
from lachesis.shim.intake.json_bodies import check_messages, decode_group, decode_groups
from lachesis.shim.intake.large_bodies import LENGTH_BYTES, MEMORY, MEMORY_BYTES, Order, Read, Reply, to_json, too_much

MAX_SPANS = 20_000  # of weight_versions: they are looked at one by one
ROWS = ("tokens", "masks", "advantages", "ref_logprobs", "inference_logprobs")


def read(order: Order, body: bytes) -> Reply:
    """The groups in a body, or why there are none."""
    size = len(body)
    try:
        if order.form == "packed":
            size = unpacked_bytes(body)
        with memory(max(MEMORY * size, MEMORY_BYTES)):
            return _groups(list(_entries(order, body)))
    except Malformed as error:
        return Reply("malformed", _json(error.details))
    except InvalidGroup as error:
        return Reply("invalid", _json((error.field, error.value, error.rule)))
    except TooMany as error:
        return Reply("too much", _json(str(error)))
    except MemoryError:
        return too_much(size)


def _entries(order: Order, body: bytes) -> Iterator[Read]:
    if order.form == "packed":
        yield Read(body, _check_packed(body, order.max_lists).env)
        return
    check_json(body, order.max_lists)
    if order.form == "group":
        groups, lax = decode_group(body)
        yield Read(_packed(groups[0], lax), env_of(groups[0]))
        return
    groups, lax = decode_groups(body)
    for group in groups:
        try:
            yield Read(_packed(group, lax), env_of(group))
        except InvalidGroup as error:
            yield Read(b"", refusal=(error.field, error.value, error.rule), posted=to_json(group))


def _groups(found: Sequence[Read]) -> Reply:
    refusals = [each.refusal for each in found]
    packed, envs, _, posted = zip(*found, strict=True) if found else ((),) * 4
    return Reply("groups", _json(refusals), packed, envs, posted)


def _json(told: Any) -> bytes:
    return json.dumps(told, default=repr).encode()


def _packed(group: Group | ScoredGroup, lax: bool) -> bytes:
    arrays = to_arrays(group) if isinstance(group, ScoredGroup) else group
    _check_rows(arrays)
    admit(arrays, reader="lax json" if lax else "strict json")
    return pack_group(arrays)


def _check_packed(body: bytes, max_lists: int) -> Group:
    group = unpack(body, check=partial(check_msgpack, max_containers=max_lists))
    _check_rows(group)
    admit(group)
    check_messages(group)
    return group


def _check_rows(group: Group) -> None:
    """What would be looked at row by row where others wait."""
    for name in ROWS:
        if (rows := len(getattr(group, name) or ())) > MAX_SEQUENCES:
            raise InvalidGroup(name, f"{rows} sequences", f"must hold at most {MAX_SEQUENCES}")
    if (spans := sum(map(len, group.versions or ()))) > MAX_SPANS:
        raise InvalidGroup("weight_versions", f"{spans} spans", f"must hold at most {MAX_SPANS}")


@contextmanager
def memory(allowed: int) -> Iterator[None]:
    """Have what takes more than `allowed` bytes beyond what is taken now fail with MemoryError."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    taken = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:")), None)
    if taken is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (taken + allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: whoever started this process ends it
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    while length := int.from_bytes(source.read(LENGTH_BYTES), "big"):
        order = msgspec.msgpack.decode(source.read(length), type=Order)
        reply = msgspec.msgpack.encode(read(order, source.read(order.bytes)))
        answers.write(len(reply).to_bytes(LENGTH_BYTES, "big"))
        answers.write(reply)
        answers.flush()


if __name__ == "__main__":
    main()

"""A model's trainable weights, its optimizer and its schedule, as tensors that one replica gives to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor


class Header(msgspec.Struct, frozen=True):
    """What the receiver must know before the tensors come."""

    tensors: list[tuple[str, tuple[int, ...], str]]  # dtype, shape and kind of device of each
    optimizer: list[dict[str, int | float]]  # of each parameter: the state's numbers, and which tensor its others are
    in_tensors: list[list[str]]  # of each parameter: the names in `optimizer` that say which tensor
    schedule: dict[str, Any]  # of the learning rate


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def trained_parameters(engine: Any) -> list[torch.nn.Parameter]:
    """Of verl's engine, in the model's order."""
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def give(engine: Any) -> tuple[bytes, list[Tensor]]:
    """Header and tensors, copied to host memory."""
    parameters = trained_parameters(engine)
    tensors = [local(parameter.detach()) for parameter in parameters]
    optimizer, in_tensors = [], []
    for parameter in parameters:
        values: dict[str, int | float] = {}
        theirs: list[str] = []
        for name, value in engine.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                theirs.append(name)
                values[name] = len(tensors)
                tensors.append(local(value))
            else:
                values[name] = value
        optimizer.append(values)
        in_tensors.append(theirs)
    shapes = [(str(part.dtype).removeprefix("torch."), tuple(part.shape), part.device.type) for part in tensors]
    header = Header(shapes, optimizer, in_tensors, dict(_plain(engine.lr_scheduler.state_dict())))
    return msgspec.msgpack.encode(header), [part.to("cpu", copy=True).contiguous() for part in tensors]


def blank(header: bytes) -> list[Tensor]:
    found = msgspec.msgpack.decode(header, type=Header)
    return [torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape, _ in found.tensors]


@torch.no_grad()
def take(engine: Any, header: bytes, tensors: Sequence[Tensor]) -> None:
    found = msgspec.msgpack.decode(header, type=Header)
    parameters = trained_parameters(engine)
    for parameter, given in zip(parameters, tensors, strict=False):
        local(parameter).copy_(given)
    engine.optimizer.state.clear()
    for parameter, values, names in zip(parameters, found.optimizer, found.in_tensors, strict=True):
        state: dict[str, Any] = dict(values)
        for name in names:
            place = int(values[name])
            given, device = tensors[place], found.tensors[place][2]
            state[name] = _like(parameter, given) if given.shape == local(parameter).shape else given.to(device)
        if state:
            engine.optimizer.state[parameter] = state
    engine.lr_scheduler.load_state_dict(engine.lr_scheduler.state_dict() | found.schedule)
    for group, rate in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _like(parameter: Tensor, given: Tensor) -> Tensor:
    """A tensor sharded as the parameter is."""
    found = torch.zeros_like(parameter, dtype=given.dtype)
    local(found).copy_(given)
    return found


def _plain(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What of a schedule's state is numbers: the rest is what it was built from."""
    for name, value in state.items():
        if isinstance(value, int | float) or (
            isinstance(value, list) and all(isinstance(one, int | float) for one in value)
        ):
            yield name, value

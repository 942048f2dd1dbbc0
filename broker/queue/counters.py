"""The counters of a run's hash `state`, which the scripts keep: what is queued, formed, delivered, dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lachesis.broker.queue import selection
from lachesis.broker.records.entries import (
    read_number,
)
from lachesis.broker.records.steps import QueueStatus

_WAITING = re.compile(rb"waiting:(@?[\w.-]+):(\d+)")


def read_status(state: Mapping[bytes, bytes]) -> QueueStatus:
    """The counters of the hash `state`. Formed but undelivered batches count as queued. What is no number counts as 0."""
    waiting: dict[str, dict[int, int]] = {}
    for field in state:
        if field.startswith(b"waiting:") and (found := _WAITING.fullmatch(field)):
            waiting.setdefault(found[1].decode(), {})[int(found[2])] = read_number(state[field])

    def counter(name: bytes) -> int:
        return read_number(state.get(name, b"0"))

    return QueueStatus(
        groups=counter(b"groups") + counter(b"undelivered_groups"),
        sequences=counter(b"sequences") + counter(b"undelivered_sequences"),
        bytes=counter(b"bytes"),
        accepted=counter(b"accepted"),
        formed=counter(b"formed"),
        delivered=counter(b"delivered"),
        waiting=waiting,
        dead=counter(b"dead"),
        purged=counter(b"purged"),
        untrainable=counter(b"untrainable"),
        refused=counter(b"refused"),
        refused_not_kept=counter(b"refused_not_kept"),
        dropped=_counters(state, b"dropped:"),
        duplicates=_counters(state, b"duplicates:"),
    )


def _counters(state: Mapping[bytes, bytes], prefix: bytes) -> dict[str, int]:
    return {
        name.removeprefix(prefix).decode(errors="replace"): read_number(count)
        for name, count in state.items()
        if name.startswith(prefix)
    }


def makes_batch(status: QueueStatus, batch_size: int) -> bool:
    """Whether a trainer that asks now gets a batch that none has had yet."""
    return status.formed > status.delivered or selection.attainable(status.waiting, {}, batch_size) is not None

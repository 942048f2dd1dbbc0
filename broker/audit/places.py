"""Where each accepted group is: here, in a stream or a batch that is kept, or freed with the batch it was trained in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec import Struct

from lachesis.broker.records.steps import LedgerEntry


class Places(Struct, frozen=True):
    """How often each group's id occurs.

    Two counts, since a group whose post came again after it was trained and freed has the same id: only what is still
    here is of one post.
    """

    here: Counter[str]
    freed: Counter[str]

    @property
    def all(self) -> Counter[str]:
        return self.freed + self.here

    @property
    def total(self) -> int:
        return self.freed.total() + self.here.total()


def find_places(
    committed: Mapping[int, LedgerEntry], kept_steps: set[int], waiting: Iterable[str], given_up: Iterable[str]
) -> Places:
    """`committed` is by step, `kept_steps` those whose batches were not freed; `waiting` and `given_up` are ids of groups."""
    here: Counter[str] = Counter()
    freed: Counter[str] = Counter()
    for step, entry in committed.items():
        (here if step in kept_steps else freed).update(entry.gids)
    here.update(waiting)
    freed.update(given_up)
    return Places(here, freed)

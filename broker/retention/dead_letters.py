"""Dead letters: accepted groups that could not be trained, and posts that were refused. To be read, put back, given up.

Accepted groups are accounted for until somebody gives them up: their stream is never trimmed and their data stays.
Refused posts are kept for whoever wants to know why, for a week, as long as there is room: compressed, and of a large
one the beginning. Beside them stand single sequences that their groups
were trained without: notes only, whose data goes with the group's.
"""

from __future__ import annotations

from collections.abc import Sequence

import zstandard
from msgspec import Struct

from lachesis.broker.errors import InvalidGroup, NotFound
from lachesis.broker.records.blobs import queue_entry
from lachesis.broker.records.entries import flat_entry, id_number, read_entries
from lachesis.broker.records.groups import DeadEntry, Group, RefusedEntry
from lachesis.broker.records.packing import unpacked_bytes
from lachesis.broker.run_view import RunView

SLICE = 1000
REFUSED_KEPT = 10_000  # refused posts
REFUSED_TTL_S = 7 * 24 * 3600
REFUSED_BYTES = 64 << 20  # of the bodies of all of them, compressed
ROOMY = 0.7  # share of maxmemory above which no refused post is kept
OVERSIZED, LOST, UNREADABLE, UNTRAINABLE = "oversized", "lost", "unreadable", "untrainable"
REASONS = {
    "stale": "accepted; by the time there was a batch for it, it lay more than --max-lag versions behind",
    "deliveries": "accepted; its batch was lent to trainers too often without being committed",
    OVERSIZED: "accepted; then a trainer registered whose batches, or sequences, may not be so large",
    LOST: "accepted; its data was deleted by hand before it was trained",
    UNREADABLE: "accepted; its data or its entry in the queue was spoilt, or written by a version that this one can't read",
    "invalid": "a post that was refused: NaN, ragged, over-long, …; kept for a week, of a large one the first MiB",
    UNTRAINABLE: "a sequence that its trainer could not use (group/place); the rest of its group was trained",
}
BODY_BYTES = 1 << 20  # that are kept of a refused post


class Letter(Struct, frozen=True):
    """One dead letter and where it is."""

    id: str  # in its stream
    at: float  # seconds since the epoch
    accepted: bool  # else it is a refused post, or one sequence of a trained group
    entry: DeadEntry

    @property
    def cut_from(self) -> int:
        """Bytes of the whole body of a refused post of which only the beginning is kept; else 0."""
        size = self.entry.size if isinstance(self.entry, RefusedEntry) else 0
        return size if size > BODY_BYTES else 0

    @property
    def sequence(self) -> tuple[str, int] | None:
        """The group's id and the sequence's place in it, if this is about one."""
        if self.entry.reason != UNTRAINABLE:
            return None
        gid, _, row = self.entry.gid.rpartition("/")
        return (gid, int(row)) if row.isdecimal() else None


def untrainable(gid: str, row: int, detail: str) -> DeadEntry:
    """What COMMIT is to note of a sequence that its group was trained without."""
    return DeadEntry(gid=f"{gid}/{row}", reason=UNTRAINABLE, deliveries=0, detail=detail)


def compressed(body: bytes) -> bytes:
    """What is kept of the body of a refused post."""
    return zstandard.ZstdCompressor(level=-1).compress(body[:BODY_BYTES])


class KeepRefused:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def __call__(
        self, gid: str, body: bytes, reason: str, detail: str, *, most_bytes: int = REFUSED_BYTES
    ) -> None:
        """Keep what was refused for triage: stream `refused`, the beginning of the body as its blob for a week.

        The oldest make room where there are too many, or their bodies have more than `most_bytes` together. While Redis is
        nearly full it is only counted.
        """
        fields = [*flat_entry(DeadEntry(gid, reason, deliveries=0, detail=detail)), "size", str(len(body))]
        keys = self._view.keys
        await self._view.scripts.keep_refused(
            keys=[keys.refused, keys.blob(gid), keys.state],
            args=[compressed(body), REFUSED_TTL_S, REFUSED_KEPT, most_bytes, ROOMY, *fields],
        )


class DeadLetters:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def all(self) -> list[Letter]:
        """Every dead letter, oldest first."""
        found = await self.accepted() + await self._read(self._view.keys.refused, RefusedEntry, accepted=False)
        return sorted(found, key=lambda letter: letter.at)

    async def accepted(self) -> list[Letter]:
        return await self._read(self._view.keys.dead, DeadEntry, accepted=True)

    async def find(self, gids: Sequence[str]) -> list[Letter]:
        """The dead letters with these ids, in that order. Raises NotFound, naming one that there is not."""
        letters = {letter.entry.gid: letter for letter in await self.all()}
        for gid in gids:
            if gid not in letters:
                raise NotFound(
                    f"{gid!r} is no dead letter of run {self._view.keys.run!r}: `lachesis dead list` shows them"
                )
        return [letters[gid] for gid in gids]

    async def body(self, letter: Letter) -> bytes:
        """What is kept of it: a blob (of a sequence: its group's), or the body as it was posted, or its beginning.

        Raises NotFound if that is gone, and InvalidGroup if it can't be decompressed.
        """
        gid, _ = letter.sequence or (letter.entry.gid, 0)
        body = await self._view.redis.get(self._view.keys.blob(gid))
        refused = letter.entry if isinstance(letter.entry, RefusedEntry) else None
        if body is None or (refused and refused.size and not refused.kept):
            raise NotFound(f"the data of {gid!r} is gone: {_why_gone(letter)}")
        if refused and refused.kept:
            return _decompressed(bytes(body))
        return bytes(body)

    async def requeue(self, letter: Letter, group: Group, stored_bytes: int) -> bool:
        """Put an accepted group (`group`: what its blob holds) back at the end of the queue. False if it is gone."""
        entry = queue_entry(group, stored_bytes)
        keys = [self._view.keys.dead, self._view.keys.groups, self._view.keys.blob(entry.gid), self._view.keys.state]
        reply = await self._view.scripts.requeue(
            keys=keys, args=[letter.id, entry.env, entry.n, entry.bytes, *flat_entry(entry)]
        )
        return bool(reply == b"requeued")

    async def purge(self, letter: Letter, *, who: str, event: str = "purge") -> bool:
        """Take a dead letter away, for good, and say so in `control`. False if it is gone."""
        keys = self._view.keys
        stream, counter = (keys.dead, "dead") if letter.accepted else (keys.refused, "")
        detail = f"{letter.entry.gid} ({letter.entry.reason}): {letter.entry.detail}"
        reply = await self._view.scripts.purge(
            keys=[stream, keys.blob(letter.entry.gid), keys.state, keys.control],
            args=[letter.id, counter, -id_number(letter.entry.gid), "event", event, "who", who, "detail", detail],
        )
        return bool(reply == b"purged")

    async def _read(self, key: str, kind: type[DeadEntry], *, accepted: bool) -> list[Letter]:
        letters: list[Letter] = []
        start = "-"
        while found := await self._view.redis.xrange(key, start, count=SLICE):
            letters += [to_letter(id_, entry, accepted=accepted) for id_, entry in read_entries(kind, found)]
            start = f"({found[-1][0].decode()}"
        return letters


def to_letter(id_: bytes, entry: DeadEntry, *, accepted: bool) -> Letter:
    id_text = id_.decode()
    return Letter(id_text, int(id_text.split("-")[0]) / 1000, accepted, entry)


def _why_gone(letter: Letter) -> str:
    if letter.sequence:
        return "the group was trained, and a checkpoint covers it"
    if letter.accepted:
        return "it was deleted by hand, as nothing else frees what a dead letter holds"
    return "refused posts are kept for a week, while all of them together are not too large"


def _decompressed(kept: bytes) -> bytes:
    if unpacked_bytes(kept) > BODY_BYTES:
        raise InvalidGroup("body", "bytes", f"must not decompress to more than {BODY_BYTES}, and nobody kept so much")
    try:
        return zstandard.ZstdDecompressor().decompress(kept)
    except zstandard.ZstdError as error:
        raise InvalidGroup("body", "bytes", f"must be what was kept of a post ({error})") from None

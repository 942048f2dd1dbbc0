"""`lachesis replay`: rollouts once more, from an archive or from another run, into a run of one's own."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import ByteSize, Field
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from lachesis.broker.errors import ConfigurationError, LachesisError
from lachesis.cli.actions import check_policy, check_run
from lachesis.cli.options import parse
from lachesis.cli.terminal import console, say
from lachesis.service.settings import RedisSettings

if TYPE_CHECKING:
    from lachesis.broker.archive.replay import Notes, Part, Replayed, Selection

PLAIN_EVERY_S = 5.0


class ReplaySettings(RedisSettings):
    """Put the groups of an archive, or of another run, into --run, in the order in which they were batched."""

    archive: str = Field("", description="replay from this archive: folder or URL, as given to `lachesis archive --to`")
    from_run: str = Field("", description="replay from this run: its kept batches, then its queue")
    from_redis_url: str = Field("", description="Redis of --from-run (default: the one replayed into)")
    steps: str = Field("", description="only these steps: FIRST:LAST, either may be left out; or one step")
    versions: str = Field("", description="only groups whose tokens all come from these versions: FIRST:LAST")
    since: datetime | None = Field(None, description="only batches formed at or after this time, e.g. 2026-05-01T12:00")
    until: datetime | None = Field(None, description="only batches formed at or before this time")
    keep_versions: bool = Field(
        False, description="keep the groups' versions (default: stamp them with the newest version of --run)"
    )
    policy: str = Field("main", description="the policy of --run whose newest version groups are stamped with")
    queue_quota_bytes: ByteSize = Field(
        ByteSize(0), ge=0, description="wait while the queue of --run holds more than so many bytes (0: no limit)"
    )
    dry_run: bool = Field(False, description="read and count, store nothing")


def main(arguments: Sequence[str]) -> int:
    settings = parse(ReplaySettings, "replay", arguments)
    if bool(settings.archive) == bool(settings.from_run):
        raise ConfigurationError("replay from where? Give --archive DIR-OR-URL or --from-run RUN")
    if settings.from_redis_url and not settings.from_run:
        raise ConfigurationError("--from-redis-url goes with --from-run")
    with settings.redis() as url:
        if settings.from_run == settings.run and settings.from_redis_url in ("", url):
            raise ConfigurationError(f"--from-run and --run are both {settings.run!r}: replay into another run")
        started = time.monotonic()
        done, refused = asyncio.run(_replay(url, settings))
    verb = "would be replayed" if settings.dry_run else "replayed"
    known = done.groups - done.stored
    say(
        f"{done.groups} groups ({done.batches} batches, {done.sequences} sequences, {done.tokens:,} tokens) {verb} into run "
        f"{settings.run!r} in {time.monotonic() - started:.1f} s"
        + (f"; {known} of them were there already" if known and not settings.dry_run else "")
        + (f"; {refused} groups or segments were refused, see above" if refused else "")
    )
    return 1 if refused else 0


async def _replay(url: str, settings: ReplaySettings) -> tuple[Replayed, int]:
    """What was replayed, and how many groups and segments were refused."""
    from lachesis.broker.archive.replay import Notes, Replayed, store
    from lachesis.broker.client import Broker

    chosen, done = selection(settings), Replayed()
    async with AsyncExitStack() as stack:
        target = await Broker.connect(url, settings.run)
        stack.push_async_callback(target.aclose)
        await check_policy(target, settings.policy)
        show = stack.enter_context(_Shown(done))
        parts, extent = await _source(url, settings, chosen, Notes(show.note, show.refuse), stack)
        async for part in parts:
            if settings.dry_run:
                done.count(part)
                show()
            else:
                await store(
                    target,
                    part,
                    done,
                    policy=settings.policy,
                    keep_versions=settings.keep_versions,
                    quota=settings.queue_quota_bytes,
                    tell=show,
                    refuse=show.refuse,
                )
    if not done.groups and not show.refused:
        raise LachesisError(f"nothing to replay: no group is in the chosen range; {extent}")
    return done, show.refused


async def _source(
    url: str, settings: ReplaySettings, chosen: Selection, notes: Notes, stack: AsyncExitStack
) -> tuple[AsyncIterator[Part], str]:
    """The chosen parts, and in words what there is to choose from."""
    from lachesis.broker.archive.replay import from_archive, from_run
    from lachesis.broker.archive.segments import Archive
    from lachesis.broker.client import Broker

    if settings.archive:
        archive = Archive(settings.archive)
        segments = await asyncio.to_thread(archive.segments)
        if not segments:
            raise ConfigurationError(f"--archive = {settings.archive!r}: there are no segments (*.lachesis)")
        last = max(segment.last for segment in segments)
        return from_archive(archive, chosen, notes), f"the archive holds steps {segments[0].first} to {last}"
    source = await Broker.connect(settings.from_redis_url or url, settings.from_run)
    stack.push_async_callback(source.aclose)
    await check_run(source, "--from-run")
    kept, queue = await source.queue.retention.kept(), await source.queue.status()
    batches = f"keeps steps {kept.first} to {kept.last}" if kept.batches else "keeps no batches"
    return from_run(source, chosen, notes), f"run {settings.from_run!r} {batches} and has {queue.groups} groups queued"


def selection(settings: ReplaySettings) -> Selection:
    """Raises ConfigurationError for a range that can't be read or is empty."""
    from lachesis.broker.archive.replay import Selection

    times = tuple(moment.timestamp() if moment else None for moment in (settings.since, settings.until))
    if times[0] is not None and times[1] is not None and times[0] > times[1]:
        raise ConfigurationError(f"--until = {settings.until}: is before --since = {settings.since}")
    return Selection(
        steps=_range("steps", settings.steps),
        versions=_range("versions", settings.versions),
        times=(times[0], times[1]),
    )


def _range(name: str, text: str) -> tuple[int | None, int | None]:
    if not text:
        return None, None
    found = re.fullmatch(r"(\d*)(:?)(\d*)", text)
    if found is None or text == ":":
        raise ConfigurationError(f"--{name} = {text!r}: must be FIRST:LAST, FIRST:, :LAST or one number")
    first = int(found[1]) if found[1] else None
    last = first if not found[2] else int(found[3]) if found[3] else None
    if first is not None and last is not None and first > last:
        raise ConfigurationError(f"--{name} = {text!r}: the first is greater than the last")
    return first, last


class _Shown:
    """Progress: a live line on a terminal, a plain one every few seconds elsewhere; on stderr, like its notes."""

    def __init__(self, done: Replayed) -> None:
        self.refused = 0
        self._done = done
        self._console = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=self._console
        )
        self._task = self._progress.add_task("")
        self._printed_at = time.monotonic()

    def __enter__(self) -> _Shown:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self) -> None:
        done = self._done
        line = f"{done.groups} groups, {done.sequences} sequences, {done.tokens:,} tokens"
        line += f"; waiting: {done.waiting}" if done.waiting else ""
        if self._console.is_terminal:
            self._progress.update(self._task, description=line)
        elif time.monotonic() - self._printed_at > PLAIN_EVERY_S:
            say(line, file=sys.stderr, flush=True)
            self._printed_at = time.monotonic()

    def refuse(self, text: str) -> None:
        self.refused += 1
        self._console.print(f"refused: {text}", soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", soft_wrap=True)

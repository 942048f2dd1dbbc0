"""`lachesis archive`: a run's trained batches into compressed segments, before they are freed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

from pydantic import ByteSize, Field
from redis.exceptions import RedisError

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError, RedisUnreachable
from lachesis.broker.records.keys import check_name
from lachesis.broker.store.redis_errors import describe
from lachesis.cli.actions import check_policy, with_broker
from lachesis.cli.options import parse
from lachesis.cli.terminal import say
from lachesis.service.settings import RedisSettings


class ArchiveSettings(RedisSettings):
    """Archive a run's trained batches, until stopped. While a run is archived, no batch is freed that is not archived."""

    to: str = Field("", description="folder or URL for the segments: DIR, s3://BUCKET/PATH, … (whatever fsspec knows)")
    policy: str = Field("main", description="the policy whose trained batches are archived")
    segment_bytes: ByteSize = Field(
        ByteSize(64 << 20), gt=0, description="size at which a segment is written; also the memory this takes"
    )
    segment_s: float = Field(60, ge=0, description="seconds after which a smaller segment is written")
    archiver_lease_s: float = Field(15, ge=1, description="seconds after which a killed archiver may be succeeded")
    once: bool = Field(False, description="archive what is trained now, and end")
    stop: bool = Field(False, description="end the archiving of the run: nothing is held back for it any more")


def main(arguments: Sequence[str]) -> int:
    settings = parse(ArchiveSettings, "archive", arguments)
    if bool(settings.to) == settings.stop:
        raise ConfigurationError("give either --to DIR-OR-URL, or --stop")
    check_name("policy", settings.policy)
    # one that archives as it comes may be there before its run is
    try:
        say(with_broker(settings, lambda broker: _run(broker, settings), existing=settings.stop or settings.once))
    except RedisError as error:
        raise RedisUnreachable(f"{describe(error)}. Nothing unarchived was freed") from error
    return 0


async def _run(broker: Broker, settings: ArchiveSettings) -> str:
    if settings.once:
        await check_policy(broker, settings.policy)
    return await (_stop(broker, settings) if settings.stop else _archive(broker, settings))


async def _archive(broker: Broker, settings: ArchiveSettings) -> str:
    from lachesis.broker.archive.archiver import Archiver
    from lachesis.broker.archive.segments import Archive
    from lachesis.service.logs import configure_logging

    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    archiver = Archiver(
        broker,
        Archive(settings.to),
        configure_logging("archiver"),
        policy=settings.policy,
        segment_bytes=settings.segment_bytes,
        every_s=settings.segment_s,
        lease_s=settings.archiver_lease_s,
    )
    await archiver.run(stopping.is_set, once=settings.once)
    return f"archived {archiver.steps} batches, {archiver.bytes:,} bytes, to {settings.to}"


async def _stop(broker: Broker, settings: ArchiveSettings) -> str:
    from lachesis.broker.archive.archiver import stop_archiving

    was = await stop_archiving(broker)
    return f"run {settings.run!r} {'is no longer archived' if was else 'was not being archived'}"

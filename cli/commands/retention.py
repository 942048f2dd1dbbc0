"""`lachesis retention`: what a run keeps of its trained batches, and for whom."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ByteSize, Field

from lachesis.broker.client import Broker
from lachesis.broker.retention.trained_batches import Kept
from lachesis.cli.actions import with_broker
from lachesis.cli.options import parse
from lachesis.cli.terminal import say, say_json, visible
from lachesis.service.settings import RedisSettings


class RetentionSettings(RedisSettings):
    """Show, or set, how many bytes of trained batches a run keeps in Redis, for `lachesis replay --from-run`."""

    keep_bytes: ByteSize | None = Field(
        None, description="keep trained batches while all kept ones take at most so many bytes, e.g. 2GiB; 0: none"
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object")


def main(arguments: Sequence[str]) -> int:
    settings = parse(RetentionSettings, "retention", arguments)

    async def run(broker: Broker) -> Kept:
        if settings.keep_bytes is not None:
            await broker.queue.retention.keep(settings.keep_bytes)
            await broker.queue.retention.free()
        return await broker.queue.retention.kept()

    kept = with_broker(settings, run)
    if settings.json_output:
        say_json(kept)
    else:
        say(*render(settings.run, kept).split("\n"))
    return 0


def render(run: str, kept: Kept) -> str:
    """A few lines."""
    rule = "trained batches are freed at once"
    if kept.keep_bytes:
        rule = f"trained batches are kept while all batches take at most {ByteSize(kept.keep_bytes).human_readable()}"
    now = "no batches now"
    if kept.batches:
        size = ByteSize(kept.bytes).human_readable()
        now = f"{kept.batches} batches now, {size}, steps {kept.first} to {kept.last}"
    readers = [f"  {visible(name)} needs those after step {step}" for name, step in sorted(kept.covered.items())]
    return "\n".join((f"run {run!r}: {rule}; {now}", *readers))

"""Settings of `lachesis tail`."""

from __future__ import annotations

from pydantic import Field

from lachesis.service.settings import RedisSettings


class TailSettings(RedisSettings):
    """Show what a run's parts have told: its newest steps, evaluations and weight updates, a line each.

    With --examples: rollouts of its steps in words, best and worst, and the evaluations between them. With --control:
    who registered, joined, left, was evicted, or reset it. Times are those of this machine's time zone.
    """

    examples: bool = Field(False, description="show rollouts: prompt, response, score, advantage and versions")
    control: bool = Field(False, description="show registrations, joins, evictions, resets: who and when")
    lines: int = Field(10, ge=0, le=10_000, description="how many of the newest to show")
    follow: bool = Field(False, description="go on showing what comes, until Ctrl-C")
    json_output: bool = Field(
        False, alias="json", description="print one JSON object a line: every field of it, and when (at, epoch seconds)"
    )

"""`lachesis audit`: the guarantees, checked against what Redis holds."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from pydantic import Field

from lachesis.broker.audit import AuditReport, audit
from lachesis.broker.client import Broker
from lachesis.cli.actions import check_policy, with_broker
from lachesis.cli.options import parse
from lachesis.cli.terminal import say, say_json, visible
from lachesis.service.settings import RedisSettings


class AuditSettings(RedisSettings):
    """Check that every accepted group is in exactly one committed step, still queued, or a dead letter. Exit code 1 if not."""

    policy: str = Field("main", description="policy whose ledger to check")
    json_output: bool = Field(False, alias="json", description="print one JSON object")


def main(arguments: Sequence[str]) -> int:
    settings = parse(AuditSettings, "audit", arguments)

    async def run(broker: Broker) -> AuditReport:
        await check_policy(broker, settings.policy)
        return await audit(broker, settings.policy)

    report = with_broker(settings, run)
    if settings.json_output:
        say_json({"clean": report.clean, **msgspec.to_builtins(report)})
    else:
        say(*render(report).split("\n"))
    return 0 if report.clean else 1


def render(report: AuditReport) -> str:
    """The report in a few lines."""
    counts = (
        f"{report.accepted} groups accepted: {report.trained} in {report.steps} committed steps, "
        f"{report.open} in open batches, {report.queued} queued"
    )
    more = {"dead letters": report.dead, "given up": report.purged, "left to other policies": report.skipped}
    more["from before this policy joined"] = report.unseen
    counts += "".join(f", {count} {what}" for what, count in more.items() if count)
    if report.clean:
        return f"clean: {counts}; none lost, none trained twice"
    return "\n".join((f"NOT clean: {counts}", *(f"  - {visible(finding)}" for finding in report.findings)))

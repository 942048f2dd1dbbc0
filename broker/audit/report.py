"""Is every accepted group in exactly one place? In a committed step, on its way to one, or a dead letter. From Redis alone."""

from __future__ import annotations

from msgspec import Struct, field

from lachesis.broker.audit.invariants import INVARIANTS, waiting_have_data
from lachesis.broker.audit.snapshot import Snapshot
from lachesis.broker.client import Broker


class AuditReport(Struct):
    """Counts of accepted groups by where they are, and what contradicts the guarantees; no findings: clean."""

    policy: str
    accepted: int
    trained: int  # groups in committed steps
    open: int  # groups in formed, uncommitted batches
    queued: int
    dead: int  # dead letters
    purged: int  # dead letters that somebody gave up
    skipped: int  # groups of batches that this policy skipped or gave up, and others may train
    unseen: int  # groups that had come and gone when this policy joined
    steps: int
    newest_version: int
    findings: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.findings


async def audit(broker: Broker, policy: str = "main") -> AuditReport:
    """Check one policy's ledger against what was accepted. Safe on a live run: the moving parts are read at one instant."""
    snapshot = await Snapshot.read(broker, policy)
    version = await broker.weights.newest(policy)
    findings = [finding for invariant in INVARIANTS for finding in invariant(snapshot)]
    findings += [finding async for finding in waiting_have_data(snapshot, broker)]
    return AuditReport(
        policy=policy,
        accepted=snapshot.count("accepted"),
        trained=sum(len(entry.gids) for entry in snapshot.ledger),
        open=sum(len(batch.gids) for batch in snapshot.open),
        queued=len(snapshot.queued),
        dead=len(snapshot.dead),
        purged=snapshot.count("purged"),
        skipped=sum(map(len, snapshot.given_up.values())),
        unseen=snapshot.unseen,
        steps=len(snapshot.ledger),
        newest_version=version.version if version else -1,
        findings=findings,
    )

"""Does what is in Redis agree with what the run guarantees? Every accepted group in exactly one place, from Redis alone.

Read report.py first; a snapshot is what the invariants are checked on, each a function in invariants.py.
"""

from lachesis.broker.audit.report import AuditReport, audit

__all__ = ["AuditReport", "audit"]
